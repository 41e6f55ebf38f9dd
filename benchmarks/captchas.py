#!/usr/bin/env python3
"""A tiny model that learns to read: digits of the package `captcha`, turned, warped, dotted and crossed out, in any colour.

usage: python benchmarks/captchas.py [FOLDER] [--digits N] [--steps N] [--images N]

The model is a LLaVA of random weights, tower and language model trained together, on images that are as the package draws them by
default. Prints the share of held-out images that it reads, and of their digits, before and after, and the seconds that training
took. Chance is a tenth of the digits.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script it finds its own folder only

from benchmarks.digits import NAMES, answers_of, save_model, train, write_questions

HELD_OUT = 500
DIGITS, IMAGES, STEPS = 1, 16_000, 2000
SIZE, PATCH, WIDTH = 60, 10, 64
PROCESSING = {
    "size": {"height": SIZE, "width": SIZE},
    "do_center_crop": False,
    "image_mean": [0.95] * 3,
    "image_std": [0.2] * 3,
}
"""All of an image is seen, squeezed into a square. Its ground becomes 0; with CLIP's own values it is 1.8, which stands out as much
as what is drawn on it."""


class Seeded(random.Random):
    """What the package draws its images by, in the place of the operating system's random numbers: all runs have the same."""

    def randbelow(self, most: int) -> int:
        return self.randrange(most)

    def randbits(self, count: int) -> int:
        return self.getrandbits(count)


def draw(count: int, digits: int) -> Iterator[tuple[Any, str]]:
    """Draw images of so many digits, with their names."""
    from captcha import image

    image.secrets = choose = Seeded(0)  # type: ignore[attr-defined]
    artist = image.ImageCaptcha(width=20 + 35 * digits, height=SIZE)
    for _ in range(count):
        shown = [choose.randrange(10) for _ in range(digits)]
        yield artist.generate_image("".join(map(str, shown))), " ".join(NAMES[digit] for digit in shown)


def shares_read(model: Path, rows: Path, digits: int) -> tuple[float, float]:
    """Return of the held-out images the share of those that are read, and of their digits the share of those that are."""
    answers = [(shown.split(), answer.split()) for shown, answer in answers_of(model, rows, tokens=digits + 1)]
    right = sum(a == b for shown, answer in answers for a, b in zip(shown, answer, strict=False))
    return sum(shown == answer for shown, answer in answers) / len(answers), right / (digits * len(answers))


def measure(
    folder: Path, digits: int = DIGITS, images: int = IMAGES, steps: int = STEPS
) -> tuple[tuple[float, float], tuple[float, float], float]:
    """Return `shares_read` before and after training, and its seconds."""
    os.environ.setdefault("DSTUNE_CACHE", str(folder / "cache"))
    rows = folder / "captchas"
    write_questions(rows, draw(HELD_OUT + images, digits), HELD_OUT)
    save_model(folder / "model", size=SIZE, patch=PATCH, width=WIDTH, heads=4, processing=PROCESSING)
    before = shares_read(folder / "model", rows, digits)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # tensors are so small that a second thread mostly waits
    changes = ["launch.export_env=[OMP_NUM_THREADS]", "data.max_length=200", "trainer.global_batch_size=4"]
    seconds = train(folder, rows, *changes, "optimizer.lr=1e-3", f"trainer.max_steps={steps}")
    return before, shares_read(folder / "run" / "export", rows, digits), seconds


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--digits", type=int, default=DIGITS, help="in an image")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--images", type=int, default=IMAGES, help="to train on")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="captchas-"))
    before, after, seconds = measure(folder, arguments.digits, arguments.images, arguments.steps)
    for when, (whole, digits) in (("before training", before), (f"after {seconds:.0f} s", after)):
        print(f"{when}: read {whole:.1%} of {HELD_OUT} held-out images, {digits:.1%} of their digits")


if __name__ == "__main__":
    _main()
