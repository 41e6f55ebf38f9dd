#!/usr/bin/env python3
"""A tiny model that learns to read: two digits of the package `captcha`, turned, warped, crossed out and of any colour.

usage: python benchmarks/captchas.py [FOLDER] [--steps N] [--images N]

The model is a LLaVA of random weights with 64 hidden units, tower and language model trained together. Prints the share of held-out
images whose two digits it reads, and of their digits, before and after, and the seconds that training took. Chance is 1% and 10%.
The package draws from the operating system's random numbers, so that no two measurements have the same images.
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

SIZE, HELD_OUT = 48, 300
IMAGES, STEPS = 8000, 1500


def draw(count: int) -> Iterator[tuple[Any, str]]:
    """Draw images of two digits, with their names."""
    from captcha.image import ImageCaptcha

    choose, artist = random.Random(0), ImageCaptcha(width=SIZE, height=SIZE, font_sizes=(26, 30))
    for _ in range(count):
        digits = [choose.randrange(10), choose.randrange(10)]
        yield artist.generate_image("".join(map(str, digits))), " ".join(NAMES[digit] for digit in digits)


def shares_read(model: Path, rows: Path) -> tuple[float, float]:
    """Return of the held-out images the share of those whose digits are both read, and of the digits those that are."""
    answers = [(shown.split(), answer.split()) for shown, answer in answers_of(model, rows, tokens=3)]
    both = sum(shown == answer for shown, answer in answers)
    digits = sum(a == b for shown, answer in answers for a, b in zip(shown, answer, strict=False))
    return both / len(answers), digits / (2 * len(answers))


def measure(
    folder: Path, images: int = IMAGES, steps: int = STEPS
) -> tuple[tuple[float, float], tuple[float, float], float]:
    """Return `shares_read` before and after training, and its seconds."""
    os.environ.setdefault("DSTUNE_CACHE", str(folder / "cache"))
    rows = folder / "captchas"
    write_questions(rows, draw(HELD_OUT + images), HELD_OUT)
    save_model(folder / "model", size=SIZE, width=64)
    before = shares_read(folder / "model", rows)
    changes = ["data.max_length=256", "optimizer.lr=2e-3", "trainer.micro_batch_size=8", f"trainer.max_steps={steps}"]
    seconds = train(folder, rows, *changes)
    return before, shares_read(folder / "run" / "export", rows), seconds


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--images", type=int, default=IMAGES)
    given = parser.parse_args()
    folder = given.folder or Path(tempfile.mkdtemp(prefix="captcha-"))
    before, after, seconds = measure(folder, given.images, given.steps)
    for when, (both, digits) in (("before training", before), (f"after {seconds:.0f} s", after)):
        print(f"{when}: read {both:.1%} of {HELD_OUT} held-out images, {digits:.1%} of their digits")


if __name__ == "__main__":
    _main()
