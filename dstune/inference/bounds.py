"""Bounds on the log-probabilities by which a model is recognised, for each precision in which its weights are stored."""

from __future__ import annotations

import math
from collections.abc import Sequence

BOUNDS = {"float32": 1e-4, "float16": 0.03, "bfloat16": 0.1}
"""Allowed differences of log-probabilities from the reference, which is in fp32. For fp32: the largest difference of a token; for
the others: the mean over a row's targets (single tokens of a bf16 model differed by 0.5, their mean by 0.03)."""


def difference(logprobs: Sequence[float], expected: Sequence[float], dtype: str) -> float:
    """Return the difference as `BOUNDS` defines it: the largest for fp32, the mean for other formats. NaN if a value is NaN."""
    differences = [abs(first - second) for first, second in zip(logprobs, expected, strict=True)]
    if any(math.isnan(value) for value in differences):
        return math.nan
    if not differences:
        return 0.0
    return max(differences) if dtype == "float32" else sum(differences) / len(differences)
