"""Metrics, one file each, and functions that compare two values of a metric. Imports no numpy, for the command line's sake."""

from __future__ import annotations

import math

from dstune.protocols import METRICS


def is_lower_better(metric: str) -> bool:
    """Return whether lower values of `metric` are better. `NAME/METRIC`, the metric of one task of several, counts as METRIC."""
    name = metric.rpartition("/")[2]
    return name in METRICS and METRICS[name].lower_is_better


def improves(metric: str, value: float, best: float | None, min_delta: float = 0.0) -> bool:
    """Return whether `value` beats `best` by more than `min_delta`; a value that is not finite beats nothing."""
    if not math.isfinite(value):
        return False
    if best is None:
        return True
    gain = best - value if is_lower_better(metric) else value - best
    return gain > min_delta
