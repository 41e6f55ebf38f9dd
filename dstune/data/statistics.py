"""Summarise the lengths of rows and how well they pack, for reports. Pure functions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import numpy as np

from dstune.data.pack import best_fit

PACKED_SAMPLE = 200_000
"""Beyond this number of lengths, an evenly spaced sample is packed: best-fit packing takes a second for a million."""


@cache
def _bounds() -> np.ndarray:
    """Return the upper bounds of the classes: integers up to 2**40, four to each doubling, among them every power of two."""
    return np.unique(np.round(2.0 ** (np.arange(4 * 40 + 1) / 4))).astype(np.int64)


def histogram(lengths: np.ndarray) -> dict[int, int]:
    """Return the number of rows by length: a class's upper bound (inclusive) -> rows in it, ascending.

    lengths: tokens [rows]. The classes are always the same, so histograms of parts add up (`merged`). Powers of two are
    bounds, so the rows longer than a power of two are counted exactly.
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
    """Return (upper bound, rows) of each class from the shortest to the longest row, including empty classes."""
    if not counted:
        return []
    bounds = _bounds()
    return [(int(bound), counted.get(int(bound), 0)) for bound in bounds if min(counted) <= bound <= max(counted)]


def longer_than(counted: Mapping[int, int], limit: int) -> int:
    """Return the number of rows with more than `limit` tokens: exact for a power of two, otherwise including those of the class
    that holds `limit`."""
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
    """Return the share of positions that hold a token if samples of `lengths` tokens are packed into rows of `max_length` tokens;
    None without samples. Beyond PACKED_SAMPLE samples, it is an estimate."""
    if not len(lengths):
        return None
    if len(lengths) > PACKED_SAMPLE:
        lengths = lengths[np.linspace(0, len(lengths) - 1, PACKED_SAMPLE).round().astype(np.int64)]
    lengths = np.asarray(lengths, dtype=np.int64)
    rows = int(best_fit(lengths, max_length).max()) + 1
    return float(lengths.sum() / (rows * max_length))
