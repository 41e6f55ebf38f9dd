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
from collections.abc import Iterable, Mapping
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
    pixels = ((scans[number].reshape(8, 8) * 255 / 16).astype("uint8") for number in order)
    images = (Image.fromarray(scan).resize((32, 32), Image.Resampling.NEAREST) for scan in pixels)
    write_questions(folder, zip(images, (NAMES[labels[number]] for number in order), strict=True), HELD_OUT)


def write_questions(folder: Path, pictures: Iterable[tuple[Any, str]], held_out: int) -> None:
    """Write images as rows that ask what they show: the first `held_out` into `asked.jsonl`, the others into `train.jsonl`.

    pictures: each image and what it shows.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts: dict[str, list[dict[str, Any]]] = {"asked": [], "train": []}
    for number, (image, shown) in enumerate(pictures):
        image.save(folder / f"{number}.png")
        question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "which"}]}
        part = "asked" if number < held_out else "train"
        messages = [question, {"role": "assistant", "content": shown}] if part == "train" else [question]
        parts[part].append({"messages": messages, "images": [f"{number}.png"], "shown": shown})
    for name, rows in parts.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def save_model(
    folder: Path,
    *,
    size: int = 32,
    patch: int = 8,
    width: int = 32,
    heads: int = 2,
    processing: Mapping[str, Any] | None = None,
) -> None:
    """Save a LLaVA of random weights that sees `size` x `size` pixels in patches; its tower and its language model have `width`
    hidden units. processing: other settings of the image processor."""
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
    square = {"height": size, "width": size}
    images = CLIPImageProcessor(**{"size": {"shortest_edge": size}, "crop_size": square, **(processing or {})})
    patches = {"patch_size": patch, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    widths = {"hidden_size": width, "intermediate_size": 2 * width}
    tower = {**widths, "num_hidden_layers": 2, "num_attention_heads": heads, "image_size": size, "patch_size": patch}
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            text_config=LlamaConfig(**language(tokenizer, initializer_range=0.05, **widths, head_dim=width // 4)),
            vision_config=CLIPVisionConfig(**tower),
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
            vision_feature_layer=-1,
            tie_word_embeddings=True,
        )
    )
    model.save_pretrained(folder)
    LlavaProcessor(images, tokenizer, image_token="<image>", **patches).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def answers_of(model: Path, rows: Path, *, tokens: int) -> list[tuple[str, str]]:
    """Return of each held-out image what it shows, and what `dstune generate` answers."""
    from dstune.cli import main

    output = rows / f"answers-{time.time_ns()}.jsonl"
    options = ["--input", str(rows / "asked.jsonl"), "--max-new-tokens", str(tokens), "--output", str(output)]
    assert main(["generate", str(model), *options]) == 0
    shown = [json.loads(line)["shown"] for line in (rows / "asked.jsonl").read_text().splitlines()]
    answers = [json.loads(line)["answer"].strip() for line in output.read_text().splitlines()]
    return list(zip(shown, answers, strict=True))


def share_named(model: Path, rows: Path) -> float:
    """Return the share of the held-out digits that the model names."""
    answers = answers_of(model, rows, tokens=2)
    return sum(shown == answer for shown, answer in answers) / len(answers)


def train(folder: Path, rows: Path, *changes: str) -> float:
    """Train the model of `folder`, tower included, on `train.jsonl` of `rows`; return the seconds."""
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
    rows = folder / "digits"
    write_digits(rows)
    save_model(folder / "model")
    share_before = share_named(folder / "model", rows)
    seconds = train(folder, rows, f"trainer.max_steps={steps}")
    return share_before, share_named(folder / "run" / "export", rows), seconds


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
