"""What a metric of evaluations is. Those of a task are computed by the task; a plugin can add one that is made of predictions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar


class Metric:
    """Base of every metric. Subclasses set `name` and register with `@dstune.metric`.

    One that overrides `compute` is computed in every evaluation of its `tasks` beside those of the task, over all rows and over
    each subgroup of `evaluate.slices`, on every rank alike: it may draw no random numbers. `trainer.early_stopping.metric`,
    `evaluate.slice_metric` and `sweep.objective` take it as any other.
    """

    name: ClassVar[str] = ""
    lower_is_better: ClassVar[bool] = False
    tasks: ClassVar[tuple[str, ...]] = ()
    """Names of the tasks whose predictions it reads."""

    def compute(self, predictions: Sequence[Any], targets: Sequence[Any], labels: tuple[str, ...]) -> float:
        """Compute the metric from what was predicted for each row and what is true.

        classification: numbers of labels in `labels`; with several labels a row lists of 0 and 1; of a regression numbers.
        token_classification: lists of tags. question_answering: a text, and a list of the texts that are right. seq2seq: texts.
        """
        raise NotImplementedError

    @classmethod
    def computed_for(cls, task: str) -> bool:
        """Return whether evaluations of the task named `task` compute it here."""
        return cls.compute is not Metric.compute and task in cls.tasks
