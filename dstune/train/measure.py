"""From what the ranks have summed and kept of an evaluation to the metrics of the task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dstune.config.task_schema import CausalLmConfig, ChatConfig, ClassificationConfig, TaskConfig
from dstune.train.metrics import classification_metrics, language_model_metrics, multi_label_metrics


@dataclass(frozen=True)
class Evaluation:
    metrics: dict[str, float]
    confusion: list[list[int]] | None = None
    """Rows are true classes, columns predicted ones, in the order of the labels."""


@dataclass(frozen=True)
class Totals:
    """Sums over all rows."""

    loss_sum: float
    weight: float
    correct: float


def measure(task: TaskConfig, labels: tuple[str, ...], totals: Totals, rows: Sequence[dict[str, Any]]) -> Evaluation:
    """The metrics of `task`. rows: what the task's head keeps of each row (`HeadOutput.rows`), in the split's order."""
    match task:
        case ChatConfig() | CausalLmConfig():
            return Evaluation(language_model_metrics(totals.loss_sum, totals.weight, totals.correct))
        case ClassificationConfig():
            predicted, true = ([row[name].tolist() for row in rows] for name in ("prediction", "label"))
            if task.multi_label:
                return Evaluation(multi_label_metrics(totals.loss_sum, predicted, true))
            return Evaluation(*classification_metrics(totals.loss_sum, predicted, true, len(labels)))
