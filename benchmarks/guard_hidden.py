"""What other windows would make of attacks that are hidden in documents: figures of docs/guard-model.md.

python benchmarks/guard_hidden.py EXPORT [--rows 50]

Hidden attacks of the test and as many benign documents of the test and of the calibration are cut into the model's windows and
into pieces that end with a line or a sentence. Each way to make one score of them is given the lowest threshold that flags no
benign document (or 5% of them), and its share of the hidden attacks is told. Scores are margins between the two labels.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from guard import rows_of

from dstune.samples.attacks.texts import place
from dstune.serve.guard.model import GuardModel

MOST_CHARACTERS = 6000
LONG = 1200
"""Characters of a text of the calibration that counts as a document."""
PIECES = {"pieces of 62 tokens": 62, "pieces of 30 tokens": 30}
WINDOWS = "windows of 128 tokens"
_BORDER = re.compile(r"[^\n]*?(?:[.!?:;][\"')\]]*\s+|\n+|$)", re.S)

Scored = list[tuple[int, int, float]]
"""Parts of a text: first token, end, score."""


def pieces(model: GuardModel, text: str, most: int) -> list[tuple[int, int, list[int]]]:
    """Neighbouring parts of at most so many tokens, each up to the last border of a line or sentence that it can hold."""
    tokenizer = model.predictor.tokenizer
    read = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=True)
    ids, offsets = read["input_ids"], read["offset_mapping"]
    borders = sorted({found.end() for found in _BORDER.finditer(text)})
    starts = [0]
    for number, (before, after) in enumerate(pairwise(offsets), 1):
        if any(before[1] <= border <= after[0] for border in borders):
            starts.append(number)
    starts.append(len(ids))
    found, start = [], 0
    while start < len(ids):
        end = max((one for one in starts if start < one <= start + most), default=min(start + most, len(ids)))
        found.append((start, end, [tokenizer.cls_token_id, *ids[start:end], tokenizer.sep_token_id]))
        start = end
    return found


def scored(model: GuardModel, text: str) -> dict[str, Scored]:
    text = text[:MOST_CHARACTERS]
    cut = {name: pieces(model, text, most) for name, most in PIECES.items()}
    length = max((end for _, end, _ in cut["pieces of 62 tokens"]), default=1)
    inner = model.window_tokens - 2
    cut[WINDOWS] = [
        (number * model.stride, min(number * model.stride + inner, length), ids)
        for number, ids in enumerate(model.windows(text))
    ]
    values = iter(margins(model, [ids for parts in cut.values() for *_, ids in parts]))
    return {name: [(start, end, next(values)) for start, end, _ in parts] for name, parts in cut.items()}


def margins(model: GuardModel, windows: Sequence[list[int]]) -> list[float]:
    return [math.log(value / (1 - value)) for value in model.score_windows(windows)]


# -- one score of many -------------------------------------------------------------------------------------------------


def highest(name: str) -> Callable[[Mapping[str, Scored]], float]:
    return lambda text: max(value for *_, value in text[name])


def above_the_others(name: str) -> Callable[[Mapping[str, Scored]], float]:
    """The highest one less the mean of all but the two highest."""

    def score(text: Mapping[str, Scored]) -> float:
        values = sorted((value for *_, value in text[name]), reverse=True)
        return values[0] - (sum(values[2:]) / len(values[2:]) if len(values) > 3 else 0.0)

    return score


def together(*names: str) -> Callable[[Mapping[str, Scored]], float]:
    """The highest mean over what holds the same token in each way to cut."""

    def means(text: Mapping[str, Scored]) -> Iterator[float]:
        for token in range(0, max(end for _, end, _ in text[names[0]]), 8):
            held = [[value for start, end, value in text[name] if start <= token < end] for name in names]
            if all(held):
                yield sum(sum(values) / len(values) for values in held) / len(held)

    return lambda text: max(means(text), default=-99.0)


WAYS: dict[str, Callable[[Mapping[str, Scored]], float]] = {
    **{f"the highest of {name}": highest(name) for name in (WINDOWS, *PIECES)},
    "windows and pieces of 62, mean": together(WINDOWS, "pieces of 62 tokens"),
    "windows and pieces of 30, mean": together(WINDOWS, "pieces of 30 tokens"),
    "windows and both pieces, mean": together(WINDOWS, *PIECES),
    "a window above the text's others": above_the_others(WINDOWS),
    "a piece of 62 above the text's others": above_the_others("pieces of 62 tokens"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export")
    parser.add_argument("--rows", type=int, default=50, help="of hidden attacks, and of each kind of document")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = GuardModel.load(options.export)
    test, calibration = rows_of("sample://attacks:test"), rows_of("sample://attacks:calibration")
    kinds: dict[str, list[Any]] = {
        "hidden": [one for one in test if one["suite"] == "hidden"],
        "test": sorted((one for one in test if one["suite"] == "document"), key=lambda one: place(one["text"])),
        "calibration": sorted(
            (one for one in calibration if len(one["text"]) > LONG), key=lambda one: place(one["text"])
        ),
    }
    found = {kind: [scored(model, one["text"]) for one in rows[: options.rows]] for kind, rows in kinds.items()}
    benign = [*found["test"], *found["calibration"]]
    print(f"{len(found['hidden'])} hidden attacks, {len(benign)} benign documents")
    print("| way | no document flagged | 5% of the documents flagged |\n| --- | --- | --- |")
    for name, way in WAYS.items():
        values, hidden = sorted(map(way, benign), reverse=True), list(map(way, found["hidden"]))
        shares = []
        for rate in (0.0, 0.05):
            above = sum(value > values[int(rate * len(values))] for value in hidden)
            shares.append(f"{above / len(hidden):.0%} ({above} of {len(hidden)})")
        print(f"| {name} | {' | '.join(shares)} |")


if __name__ == "__main__":
    main()
