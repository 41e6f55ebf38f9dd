"""Metrics of an evaluation, from sums that every rank agrees on and from what the heads keep of each row."""

from __future__ import annotations

import math

from dstune.train.metrics.answers import answer_metrics
from dstune.train.metrics.classification import classification_metrics, multi_label_metrics, regression_metrics
from dstune.train.metrics.embedding import embedding_metrics
from dstune.train.metrics.language import language_model_metrics
from dstune.train.metrics.preference import preference_metrics, reward_metrics
from dstune.train.metrics.tokens import token_metrics

__all__ = [
    "LOWER_IS_BETTER",
    "answer_metrics",
    "classification_metrics",
    "embedding_metrics",
    "improves",
    "is_lower_better",
    "language_model_metrics",
    "multi_label_metrics",
    "preference_metrics",
    "regression_metrics",
    "reward_metrics",
    "token_metrics",
]

LOWER_IS_BETTER = frozenset({"loss", "perplexity", "bits_per_byte", "mae", "rmse", "ter", "gap"})


def is_lower_better(metric: str) -> bool:
    """Whether less of `metric` is better; that of one task of several (`NAME/METRIC`) is as it is elsewhere."""
    return metric.rpartition("/")[2] in LOWER_IS_BETTER


def improves(metric: str, value: float, best: float | None, min_delta: float = 0.0) -> bool:
    """Whether `value` beats `best` by more than `min_delta`; a value that is not finite beats nothing."""
    if not math.isfinite(value):
        return False
    if best is None:
        return True
    gain = best - value if is_lower_better(metric) else value - best
    return gain > min_delta
