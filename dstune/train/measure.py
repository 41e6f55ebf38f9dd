"""From what the ranks have summed and kept of an evaluation to the metrics of the task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dstune.config.task_schema import (
    CausalLmConfig,
    ChatConfig,
    ClassificationConfig,
    EmbeddingConfig,
    PreferenceConfig,
    RewardConfig,
    TaskConfig,
)
from dstune.train.metrics import (
    classification_metrics,
    embedding_metrics,
    language_model_metrics,
    multi_label_metrics,
    preference_metrics,
    reward_metrics,
)


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
    more: Mapping[str, float] = field(default_factory=dict)
    """The other sums of the task's head, by name (`HeadOutput.sums`)."""

    @classmethod
    def of(cls, sums: Mapping[str, float]) -> Totals:
        """From sums by name (`models.heads.sums_of`)."""
        own = ("loss_sum", "weight", "correct")
        more = {name: value for name, value in sums.items() if name not in own}
        return cls(sums["loss_sum"], sums["weight"], sums["correct"], more)


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
        case PreferenceConfig():
            return Evaluation(preference_metrics(totals.loss_sum, totals.weight, totals.correct, totals.more))
        case RewardConfig():
            return Evaluation(reward_metrics(totals.loss_sum, totals.weight, totals.correct, totals.more))
        case EmbeddingConfig():
            return Evaluation(embedding_metrics(rows, task.temperature))


def measure_step(task: TaskConfig, totals: Totals) -> dict[str, float]:
    """What a training step reports beside its loss."""
    if not isinstance(task, (PreferenceConfig, RewardConfig)):
        return {}
    metrics = measure(task, (), totals, []).metrics
    return {name: value for name, value in metrics.items() if name not in ("loss", "targets")}
