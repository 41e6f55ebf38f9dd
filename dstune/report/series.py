"""Turns the rows of metrics.jsonl into curves: one series per metric, smoothed, and thinned without losing spikes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

DRAWN_POINTS = 600
"""The most points drawn of a curve: about as many as it has pixels, so that more would only make the page slow."""
SMOOTHED_FROM = 16
"""The fewest points of a curve that is smoothed."""


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
    """Return a series for each metric that has a finite number in some row, in the order of first appearance.

    If a step was logged twice, its last value counts.
    """
    points_by_name: dict[str, dict[int, float | None]] = {}
    measured_names: set[str] = set()
    for row in rows:
        for name, value in row.items():
            if name == "step" or isinstance(value, (bool, str, list, dict)):
                continue
            finite = isinstance(value, (int, float)) and math.isfinite(value)
            points_by_name.setdefault(name, {})[row["step"]] = float(value) if finite else None
            if finite:
                measured_names.add(name)
    curves = {}
    for name, points in points_by_name.items():
        if name in measured_names:
            ordered = sorted(points.items())
            curves[name] = Series(tuple(step for step, _ in ordered), tuple(value for _, value in ordered))
    return curves


def smoothing_span(points: int) -> int:
    """Return how many points the smoothed curve averages over: about a twentieth of all; 0 for a curve too short to smooth."""
    return max(5, round(points / 20)) if points >= SMOOTHED_FROM else 0


def smoothed(series: Series, span: int) -> Series:
    """Compute the bias-corrected exponential moving average with the centre of mass of a window of `span` points.

    alpha = 2 / (span + 1). The average is divided by the sum of its weights so far, so the first values are not dragged towards 0
    (Kingma and Ba 2015, arXiv:1412.6980, section 3). Gaps stay gaps and have no weight.
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
    """Return about `limit` points at most: the lowest and the highest of each stretch, so that every spike stays visible."""
    count = len(series.steps)
    if count <= limit:
        return series
    indices: list[int] = []
    stretches = limit // 2
    for number in range(stretches):
        stretch = range(number * count // stretches, (number + 1) * count // stretches)
        finite = [(value, index) for index in stretch if (value := series.values[index]) is not None]
        if not finite:
            indices.append(stretch[0])
            continue
        _, lowest = min(finite, key=lambda point: point[0])
        _, highest = max(finite, key=lambda point: point[0])
        indices += [lowest, highest]
    indices = sorted({0, *indices, count - 1})
    return Series(tuple(series.steps[index] for index in indices), tuple(series.values[index] for index in indices))
