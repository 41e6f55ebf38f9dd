"""Lengths of rows and how well they pack, as numbers that a report shows. Pure functions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import numpy as np

from dstune.data.pack import best_fit

PACKED_SAMPLE = 200_000
"""More lengths than that are judged by an evenly spaced sample: best-fit packing takes a second for a million."""


@cache
def _bounds() -> np.ndarray:
    """Return whole numbers four to an octave, every power of two among them, up to 2**40."""
    return np.unique(np.round(2.0 ** (np.arange(4 * 40 + 1) / 4))).astype(np.int64)


def histogram(lengths: np.ndarray) -> dict[int, int]:
    """Return number of rows by length: upper bound of a class (inclusive) -> rows in it, in rising order.

    lengths: tokens [rows]. The classes are always the same, so histograms of parts add up (`merged`). Powers of two are
    bounds, so the rows longer than one are counted exactly.
    """
    classes, counts = np.unique(np.searchsorted(_bounds(), lengths, side="left"), return_counts=True)
    return {int(_bounds()[number]): int(count) for number, count in zip(classes, counts, strict=True)}


def merged(parts: Iterable[Mapping[int, int]]) -> dict[int, int]:
    """Return the histogram of all rows of `parts`."""
    total: dict[int, int] = {}
    for part in parts:
        for bound, count in part.items():
            total[bound] = total.get(bound, 0) + count
    return dict(sorted(total.items()))


def classes(counted: Mapping[int, int]) -> list[tuple[int, int]]:
    """Return (upper bound, rows) of every class from the shortest to the longest row, empty ones included."""
    if not counted:
        return []
    bounds = _bounds()
    return [(int(bound), counted.get(int(bound), 0)) for bound in bounds if min(counted) <= bound <= max(counted)]


def longer_than(counted: Mapping[int, int], limit: int) -> int:
    """Return rows of more than `limit` tokens, exact where `limit` is a power of two, else from the next class on."""
    return sum(count for bound, count in counted.items() if bound > limit)


def with_packing(
    report: Mapping[str, dict[str, Any]], lengths: Mapping[str, np.ndarray], max_length: int
) -> dict[str, dict[str, Any]]:
    """Return `report` (of PreparedData) with the packing efficiency of each part in `lengths` (tokens of its samples)."""
    return {
        part: {**counts, "packing": packing(lengths[part], max_length)} if part in lengths else counts
        for part, counts in report.items()
    }


def packing(lengths: np.ndarray, max_length: int) -> float | None:
    """Return share of positions that hold a token when samples of `lengths` tokens are packed into rows of `max_length`; None
    for no sample. Above PACKED_SAMPLE samples an estimate."""
    if not len(lengths):
        return None
    if len(lengths) > PACKED_SAMPLE:
        lengths = lengths[np.linspace(0, len(lengths) - 1, PACKED_SAMPLE).round().astype(np.int64)]
    lengths = np.asarray(lengths, dtype=np.int64)
    rows = int(best_fit(lengths, max_length).max()) + 1
    return float(lengths.sum() / (rows * max_length))
