#!/usr/bin/env python3
"""A tiny model that learns to see: scikit-learn's digits (1,797 scans of 8 x 8 pixels), asked "which digit?", answered by its name.

usage: python benchmarks/digits.py [FOLDER] [--steps N]

The model is a LLaVA of random weights with 32 hidden units, tower and language model trained together. Prints the share of 297
held-out digits that it names, before and after, and the seconds that training took.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
HELD_OUT = 297
STEPS = 600


def write_digits(folder: Path) -> None:
    """Write `train.jsonl` and `asked.jsonl` beside the scans, each enlarged to 32 x 32 pixels."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    folder.mkdir(parents=True, exist_ok=True)
    scans, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(scans))
    parts: dict[str, list[dict[str, Any]]] = {"asked": [], "train": []}
    for place, number in enumerate(order):
        pixels = (scans[number].reshape(8, 8) * 255 / 16).astype("uint8")
        Image.fromarray(pixels).resize((32, 32), Image.Resampling.NEAREST).save(folder / f"{number}.png")
        asked = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "which"}]}
        answer = {"role": "assistant", "content": NAMES[labels[number]]}
        part = "asked" if place < HELD_OUT else "train"
        messages = [asked, answer] if part == "train" else [asked]
        parts[part].append({"messages": messages, "images": [f"{number}.png"], "digit": NAMES[labels[number]]})
    for name, rows in parts.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def save_model(folder: Path) -> None:
    """Save a LLaVA of random weights that sees 32 x 32 pixels in patches of 8."""
    import torch
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    from tests.support.sight import language, tokenizer_with

    tokenizer = tokenizer_with({"image_token": "<image>"}, "<image>", ["which", *NAMES])
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    sizes = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            text_config=LlamaConfig(**language(tokenizer, initializer_range=0.05)),
            vision_config=CLIPVisionConfig(**tower, image_size=32, patch_size=8),
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
            vision_feature_layer=-1,
            tie_word_embeddings=True,
        )
    )
    model.save_pretrained(folder)
    LlavaProcessor(images, tokenizer, image_token="<image>", **sizes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def share_named(model: Path, folder: Path) -> float:
    """Return the share of the held-out digits that `dstune generate` names."""
    from dstune.cli import main

    output = folder / f"answers-{time.time_ns()}.jsonl"
    options = ["--input", str(folder / "digits" / "asked.jsonl"), "--max-new-tokens", "2", "--output", str(output)]
    assert main(["generate", str(model), *options]) == 0
    digits = [json.loads(line)["digit"] for line in (folder / "digits" / "asked.jsonl").read_text().splitlines()]
    answers = [json.loads(line)["answer"].strip() for line in output.read_text().splitlines()]
    return sum(answer == digit for answer, digit in zip(answers, digits, strict=True)) / len(digits)


def measure(folder: Path, steps: int = STEPS) -> tuple[float, float, float]:
    """Return share of held-out digits named before and after training, and its seconds."""
    from dstune.cli import main

    os.environ.setdefault("DSTUNE_CACHE", str(folder / "cache"))
    write_digits(folder / "digits")
    save_model(folder / "model")
    share_before = share_named(folder / "model", folder)
    words = [
        "task=chat",
        "method=full",
        f"model.path={folder / 'model'}",
        "model.train_vision=true",
        f"data.train={folder / 'digits' / 'train.jsonl'}",
        "data.split.validation=0",
        "data.max_length=128",
        "optimizer.lr=3e-3",
        "zero=stage0",
        "trainer.precision=fp32",
        "trainer.micro_batch_size=4",
        "trainer.global_batch_size=8",
        f"trainer.max_steps={steps}",
        "evaluate.samples=0",
        "launch.processes=1",
        "tracking.wandb.mode=disabled",
        f"run.dir={folder / 'run'}",
    ]
    began = time.monotonic()
    assert main(["train", *words]) == 0
    seconds = time.monotonic() - began
    return share_before, share_named(folder / "run" / "export", folder), seconds


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="digits-"))
    share_before, share_after, seconds = measure(folder, arguments.steps)
    print(
        f"named {share_before:.1%} of {HELD_OUT} held-out digits before training, {share_after:.1%} after {seconds:.0f} s"
    )


if __name__ == "__main__":
    _main()
