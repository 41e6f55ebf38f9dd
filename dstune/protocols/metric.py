"""Defines a metric of evaluations. Tasks compute their own metrics; a plugin can add one that is computed from predictions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar


class Metric:
    """Base of every metric. Subclasses set `name` and register with `@dstune.metric`.

    If it overrides `compute`, every evaluation of its `tasks` also computes it, over all rows and over each subgroup of
    `evaluate.slices`. Every rank must get the same value, so it must not draw random numbers. `trainer.early_stopping.metric`,
    `evaluate.slice_metric` and `sweep.objective` accept it like any other.
    """

    name: ClassVar[str] = ""
    lower_is_better: ClassVar[bool] = False
    tasks: ClassVar[tuple[str, ...]] = ()
    """Names of the tasks whose predictions it reads."""

    def compute(self, predictions: Sequence[Any], targets: Sequence[Any], labels: tuple[str, ...]) -> float:
        """Compute the metric from the predictions and the true values, one per row.

        classification: numbers of labels in `labels`; with several labels a row lists of 0 and 1; of a regression numbers.
        token_classification: lists of tags. question_answering: a text, and a list of the texts that are right. seq2seq: texts.
        """
        raise NotImplementedError

    @classmethod
    def computed_for(cls, task: str) -> bool:
        """Return whether evaluations of the task named `task` compute this metric with `compute`."""
        return cls.compute is not Metric.compute and task in cls.tasks
