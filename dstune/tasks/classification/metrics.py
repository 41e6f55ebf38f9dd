"""Compute the metrics of classification with scikit-learn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dstune.tasks.classification.config import ClassificationConfig
from dstune.trainer.measure import Evaluation, Row, Totals


def classification_metrics(
    predictions: Sequence[int], labels: Sequence[int], probabilities: np.ndarray
) -> tuple[dict[str, float], list[list[int]]]:
    """Return metrics of scikit-learn, and the confusion matrix [true class, predicted class]. probabilities: [rows, classes].

    `f1_macro` is the mean over the classes that occur among labels or predictions, as in scikit-learn: other classes say nothing.
    `auroc` is that of the second class if there are two; otherwise the mean over the classes, each against all others.
    """
    from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, matthews_corrcoef

    classes = probabilities.shape[1]
    metrics = {
        "accuracy": float(accuracy_score(labels, predictions)),
        "f1_macro": float(f1_score(labels, predictions, average="macro", zero_division=0.0)),
        "f1_micro": float(f1_score(labels, predictions, average="micro", zero_division=0.0)),
        "mcc": float(matthews_corrcoef(labels, predictions)),
        **_auroc(
            np.eye(classes)[list(labels)][:, -1:] if classes == 2 else np.eye(classes)[list(labels)], probabilities
        ),
        "targets": float(len(labels)),
    }
    return metrics, confusion_matrix(labels, predictions, labels=list(range(classes))).tolist()


def multi_label_metrics(
    predictions: Sequence[Sequence[int]], labels: Sequence[Sequence[int]], probabilities: np.ndarray
) -> dict[str, float]:
    """Return metrics of scikit-learn for rows of 0 and 1, [rows][labels]. `accuracy` is the share of rows with all labels right,
    `auroc` the mean over the labels. probabilities: [rows, labels]."""
    from sklearn.metrics import accuracy_score, f1_score

    # With a single label, scikit-learn treats 0 and 1 as two classes and averages over both; only the 1 should count.
    only: dict[str, Any] = {"labels": [1]} if len(labels[0]) == 1 else {}
    true, predicted = ([row if len(row) > 1 else row[0] for row in rows] for rows in (labels, predictions))
    return {
        "accuracy": float(accuracy_score(true, predicted)),
        "f1_macro": float(f1_score(true, predicted, average="macro", zero_division=0.0, **only)),
        "f1_micro": float(f1_score(true, predicted, average="micro", zero_division=0.0, **only)),
        **_auroc(np.array(labels), probabilities),
        "targets": float(len(labels)),
    }


def _auroc(labels: np.ndarray, probabilities: np.ndarray) -> dict[str, float]:
    """Return the mean area under the ROC curve over the last `labels.shape[1]` columns of `probabilities`; classes that no row or
    every row has are left out. labels: 0 and 1, [rows, classes]."""
    from sklearn.metrics import roc_auc_score

    probabilities = probabilities[:, -labels.shape[1] :]
    if not np.isfinite(probabilities).all():  # scikit-learn would raise, but a diverged run has to end with its result
        return {"auroc": float("nan")}
    areas = [
        roc_auc_score(labels[:, column], probabilities[:, column])
        for column in range(labels.shape[1])
        if 0 < labels[:, column].sum() < len(labels)
    ]
    return {"auroc": float(np.mean(areas))} if areas else {}


def regression_metrics(predictions: Sequence[float], labels: Sequence[float]) -> dict[str, float]:
    """Return errors, and correlations by scipy. The correlations are 0 if predictions or labels are the same for all rows."""
    from scipy.stats import pearsonr, spearmanr

    predicted, true = np.array(predictions, dtype=np.float64), np.array(labels, dtype=np.float64)
    varied = len(true) > 1 and np.ptp(predicted) > 0 and np.ptp(true) > 0
    return {
        "mae": float(np.abs(predicted - true).mean()),
        "rmse": float(np.sqrt(np.square(predicted - true).mean())),
        "pearson": float(pearsonr(predicted, true).statistic) if varied else 0.0,
        "spearman": float(spearmanr(predicted, true).statistic) if varied else 0.0,
        "targets": float(len(true)),
    }


def measure(task: ClassificationConfig, totals: Totals, outputs: Sequence[Row]) -> Evaluation:
    loss = {"loss": totals.loss_sum / totals.weight}
    predicted, true = ([row[name].tolist() for row in outputs] for name in ("prediction", "label"))
    pairs = tuple(zip(true, predicted, strict=True))
    if task.regression:
        return Evaluation(loss | regression_metrics(predicted, true), predictions=pairs)
    probabilities = np.stack([row["probability"] for row in outputs])
    if task.multi_label:
        return Evaluation(loss | multi_label_metrics(predicted, true, probabilities), predictions=pairs)
    metrics, confusion = classification_metrics(predicted, true, probabilities)
    return Evaluation(loss | metrics, {"confusion": confusion}, predictions=pairs)
