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
from collections.abc import Iterable
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

    scans, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(scans))
    enlarged = ((scans[number].reshape(8, 8) * 255 / 16).astype("uint8") for number in order)
    images = (Image.fromarray(pixels).resize((32, 32), Image.Resampling.NEAREST) for pixels in enlarged)
    write_questions(folder, zip(images, (NAMES[labels[number]] for number in order), strict=True), HELD_OUT)


def write_questions(folder: Path, drawn: Iterable[tuple[Any, str]], held_out: int) -> None:
    """Write images and what they show as rows that ask for it: the first `held_out` in `asked.jsonl`, others in `train.jsonl`."""
    folder.mkdir(parents=True, exist_ok=True)
    parts: dict[str, list[dict[str, Any]]] = {"asked": [], "train": []}
    for number, (image, shown) in enumerate(drawn):
        image.save(folder / f"{number}.png")
        asked = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "which"}]}
        answer = {"role": "assistant", "content": shown}
        part = "asked" if number < held_out else "train"
        messages = [asked, answer] if part == "train" else [asked]
        parts[part].append({"messages": messages, "images": [f"{number}.png"], "shown": shown})
    for name, rows in parts.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def save_model(folder: Path, *, size: int = 32, width: int = 32) -> None:
    """Save a LLaVA of random weights that sees `size` x `size` pixels in patches of 8; tower and language model are as wide."""
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
    images = CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    patches = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2}
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            text_config=LlamaConfig(**language(tokenizer, initializer_range=0.05, **sizes)),
            vision_config=CLIPVisionConfig(**sizes, num_attention_heads=width // 16, image_size=size, patch_size=8),
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
            vision_feature_layer=-1,
            tie_word_embeddings=True,
        )
    )
    model.save_pretrained(folder)
    LlavaProcessor(images, tokenizer, image_token="<image>", **patches).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def answers_of(model: Path, folder: Path, *, tokens: int) -> list[tuple[str, str]]:
    """Return what each held-out image of `folder` shows, and what `dstune generate` answers."""
    from dstune.cli import main

    output = folder / f"answers-{time.time_ns()}.jsonl"
    given = ["--input", str(folder / "asked.jsonl"), "--max-new-tokens", str(tokens), "--output", str(output)]
    assert main(["generate", str(model), *given]) == 0
    shown = [json.loads(line)["shown"] for line in (folder / "asked.jsonl").read_text().splitlines()]
    answers = [json.loads(line)["answer"].strip() for line in output.read_text().splitlines()]
    return list(zip(shown, answers, strict=True))


def share_named(model: Path, folder: Path) -> float:
    """Return the share of the held-out digits that the model names."""
    answers = answers_of(model, folder, tokens=2)
    return sum(shown == answer for shown, answer in answers) / len(answers)


def train(folder: Path, rows: Path, *changes: str) -> float:
    """Train the model of `folder`, tower included, on `train.jsonl` in `rows`; return its seconds."""
    from dstune.cli import main

    words = [
        "task=chat",
        "method=full",
        f"model.path={folder / 'model'}",
        "model.train_vision=true",
        f"data.train={rows / 'train.jsonl'}",
        "data.split.validation=0",
        "data.max_length=128",
        "optimizer.lr=3e-3",
        "zero=stage0",
        "trainer.precision=fp32",
        "trainer.micro_batch_size=4",
        "trainer.global_batch_size=8",
        "evaluate.samples=0",
        "launch.processes=1",
        "tracking.wandb.mode=disabled",
        f"run.dir={folder / 'run'}",
        *changes,
    ]
    began = time.monotonic()
    assert main(["train", *words]) == 0
    return time.monotonic() - began


def measure(folder: Path, steps: int = STEPS) -> tuple[float, float, float]:
    """Return share of held-out digits named before and after training, and its seconds."""
    os.environ.setdefault("DSTUNE_CACHE", str(folder / "cache"))
    write_digits(folder / "digits")
    save_model(folder / "model")
    share_before = share_named(folder / "model", folder / "digits")
    seconds = train(folder, folder / "digits", f"trainer.max_steps={steps}")
    return share_before, share_named(folder / "run" / "export", folder / "digits"), seconds


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
