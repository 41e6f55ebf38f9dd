"""Metrics of classification, by scikit-learn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def classification_metrics(
    loss_sum: float, predictions: Sequence[int], labels: Sequence[int], classes: int
) -> tuple[dict[str, float], list[list[int]]]:
    """Metrics of scikit-learn, and the confusion matrix [true class, predicted class]."""
    from sklearn.metrics import accuracy_score, confusion_matrix, f1_score

    everything: dict[str, Any] = {"labels": list(range(classes)), "zero_division": 0.0}
    metrics = {
        "loss": loss_sum / len(labels),
        "accuracy": float(accuracy_score(labels, predictions)),
        "f1_macro": float(f1_score(labels, predictions, average="macro", **everything)),
        "f1_micro": float(f1_score(labels, predictions, average="micro", **everything)),
        "targets": float(len(labels)),
    }
    return metrics, confusion_matrix(labels, predictions, labels=list(range(classes))).tolist()


def multi_label_metrics(
    loss_sum: float, predictions: Sequence[Sequence[int]], labels: Sequence[Sequence[int]]
) -> dict[str, float]:
    """Metrics of scikit-learn for rows of 0 and 1, [rows][labels]; `accuracy` is the share of rows with all right."""
    from sklearn.metrics import accuracy_score, f1_score

    # For one label alone, scikit-learn takes 0 and 1 for two classes and means over both; it is the 1 that counts.
    only: dict[str, Any] = {"labels": [1]} if len(labels[0]) == 1 else {}
    true, found = ([row if len(row) > 1 else row[0] for row in rows] for rows in (labels, predictions))
    return {
        "loss": loss_sum / len(labels),
        "accuracy": float(accuracy_score(true, found)),
        "f1_macro": float(f1_score(true, found, average="macro", zero_division=0.0, **only)),
        "f1_micro": float(f1_score(true, found, average="micro", zero_division=0.0, **only)),
        "targets": float(len(labels)),
    }
