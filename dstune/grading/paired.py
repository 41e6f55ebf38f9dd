"""Bootstrap intervals of differences, and a sign test: whether two models differ on the same rows."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

RESAMPLES = 2000
_BLOCK = 200
"""Number of resamples that are drawn together."""


def bootstrap_means(values: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Return the means [resamples] of values [rows] that are drawn with replacement; the same ones for the same seed."""
    generator = np.random.default_rng(seed)
    return np.concatenate(
        [
            values[generator.integers(len(values), size=(min(_BLOCK, resamples - start), len(values)))].mean(axis=1)
            for start in range(0, resamples, _BLOCK)
        ]
    )


def interval(means: np.ndarray) -> tuple[float, float]:
    """Return the 95% percentile interval (Efron and Tibshirani 1993, chapter 13)."""
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def paired_interval(before: np.ndarray, after: np.ndarray, resamples: int = RESAMPLES) -> tuple[float, float]:
    """Return the 95% interval of the mean difference of scores [rows] of the same rows."""
    return interval(bootstrap_means(after - before, resamples))


def interval_of_gains(first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    """Return the 95% interval of mean(first) - mean(second), gains [rows] of two sets of rows."""
    return interval(bootstrap_means(first) - bootstrap_means(second, seed=1))


def sign_test(difference: np.ndarray) -> float:
    """Return the two-sided p-value of the signs of differences [rows]; rows that stay the same do not count."""
    up, down = int((difference > 0).sum()), int((difference < 0).sum())
    if not up + down:
        return 1.0
    tail = sum(math.comb(up + down, count) for count in range(min(up, down) + 1)) / 2 ** (up + down)
    return min(1.0, 2 * tail)


def paired_change(before: Any, after: Any) -> dict[str, Any]:
    """Return the change between two sets of scores [rows] of the same rows.

    `verdict` is `up` or `down` if the whole interval lies on one side of 0 and the sign test is significant at 5%, otherwise
    `none`.
    """
    first, second = np.asarray(before, dtype=float), np.asarray(after, dtype=float)
    low, high = paired_interval(first, second)
    is_significant = sign_test(second - first) < 0.05
    return {
        "before": float(first.mean()),
        "after": float(second.mean()),
        "difference": float((second - first).mean()),
        "low": low,
        "high": high,
        "up": int((second > first).sum()),
        "down": int((second < first).sum()),
        "verdict": "up" if low > 0 and is_significant else "down" if high < 0 and is_significant else "none",
    }
