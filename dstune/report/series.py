"""From the rows of metrics.jsonl to curves: one series a metric, smoothed, and thinned without losing spikes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

DRAWN_POINTS = 600
"""More points than that make a page slow and a line no better: it is about as many as it has pixels."""
SMOOTHED_FROM = 16
"""Shorter curves are read as they are."""


@dataclass(frozen=True)
class Series:
    """One metric over optimizer steps; None where a value was not finite (JSON has no NaN)."""

    steps: tuple[int, ...]
    values: tuple[float | None, ...]

    @property
    def finite(self) -> list[float]:
        return [value for value in self.values if value is not None]

    @property
    def first(self) -> float | None:
        return next(iter(self.finite), None)

    @property
    def last(self) -> float | None:
        return next(reversed(self.finite), None)

    @property
    def gaps(self) -> int:
        return sum(value is None for value in self.values)


def collect(rows: Iterable[Mapping[str, Any]]) -> dict[str, Series]:
    """Return every metric with a number in some row, in the order of its first appearance. A step logged twice keeps the last."""
    points_by_name: dict[str, dict[int, float | None]] = {}
    numbers: set[str] = set()
    for row in rows:
        for name, value in row.items():
            if name == "step" or isinstance(value, (bool, str, list, dict)):
                continue
            finite = isinstance(value, (int, float)) and math.isfinite(value)
            points_by_name.setdefault(name, {})[row["step"]] = float(value) if finite else None
            if finite:
                numbers.add(name)
    curves = {}
    for name, points in points_by_name.items():
        if name in numbers:
            ordered = sorted(points.items())
            curves[name] = Series(tuple(step for step, _ in ordered), tuple(value for _, value in ordered))
    return curves


def smoothing_span(points: int) -> int:
    """Return steps that the smoothed curve averages over: about a twentieth of the run; 0 for curves too short to smooth."""
    return max(5, round(points / 20)) if points >= SMOOTHED_FROM else 0


def smoothed(series: Series, span: int) -> Series:
    """Compute the exponential moving average with the centre of mass of `span` steps, without the bias of its start.

    alpha = 2 / (span + 1); the sum of the weights so far divides, so the first value is not dragged towards 0
    (Kingma and Ba 2015, arXiv:1412.6980, section 3). Gaps stay gaps and weigh nothing.
    """
    keep = 1.0 - 2.0 / (span + 1)
    total = weight = 0.0
    values: list[float | None] = []
    for value in series.values:
        if value is None:
            values.append(None)
            continue
        total, weight = keep * total + value, keep * weight + 1.0
        values.append(total / weight)
    return Series(series.steps, tuple(values))


def thinned(series: Series, limit: int = DRAWN_POINTS) -> Series:
    """Return at most about `limit` points: the lowest and the highest of each stretch, so that every spike stays visible."""
    count = len(series.steps)
    if count <= limit:
        return series
    indices: list[int] = []
    stretches = limit // 2
    for number in range(stretches):
        stretch = range(number * count // stretches, (number + 1) * count // stretches)
        finite = [index for index in stretch if series.values[index] is not None]
        if not finite:
            indices.append(stretch[0])
            continue
        extremes = {min(finite, key=_value(series.values)), max(finite, key=_value(series.values))}
        indices += sorted(extremes)
    indices = sorted({0, *indices, count - 1})
    return Series(tuple(series.steps[index] for index in indices), tuple(series.values[index] for index in indices))


def _value(values: Sequence[float | None]) -> Any:
    return values.__getitem__
