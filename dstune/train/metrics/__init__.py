"""Metrics of an evaluation, from sums that every rank agrees on and from what the heads keep of each row."""

from __future__ import annotations

from dstune.train.metrics.answers import answer_metrics
from dstune.train.metrics.classification import classification_metrics, multi_label_metrics, regression_metrics
from dstune.train.metrics.embedding import embedding_metrics
from dstune.train.metrics.language import language_model_metrics
from dstune.train.metrics.preference import preference_metrics, reward_metrics
from dstune.train.metrics.tokens import token_metrics

__all__ = [
    "answer_metrics",
    "classification_metrics",
    "embedding_metrics",
    "language_model_metrics",
    "multi_label_metrics",
    "preference_metrics",
    "regression_metrics",
    "reward_metrics",
    "token_metrics",
]
