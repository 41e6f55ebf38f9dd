"""Results of an evaluation: sums over the ranks, values of single rows, and the metrics of a task."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from dstune.core.errors import Problem, UserError
from dstune.data.prepared import Split
from dstune.protocols import METRICS, Metric, registered_metrics, task_of
from dstune.protocols.task import Task, TaskConfig
from dstune.trainer.generation import Generated

Row = dict[str, np.ndarray]
"""The head's values of a sample (`HeadOutput.rows`)."""


@dataclass(frozen=True)
class Evaluation:
    metrics: dict[str, float]
    details: dict[str, Any] = field(default_factory=dict)
    """Results that are not single numbers, as JSON: `confusion` (rows are true classes, columns predicted ones, in the order of
    the labels); `by_type`, metrics of each type of entity or tag."""
    generated: tuple[Generated, ...] = ()
    """Rows with the text that the model generated (seq2seq)."""
    predictions: tuple[tuple[Any, Any], ...] = ()
    """The (target, prediction) of each row. Classification: indices of labels, or lists of 0 and 1 if a row may have several;
    regression: numbers; tagging: tags of the words; question answering: the correct answers, and the predicted one."""

    warnings: tuple[str, ...] = ()
    """What a reader of the metrics has to know."""
    missing: frozenset[str] = frozenset()
    """Names of metrics that this evaluation could not measure, and that another may."""

    def row_results(self, labels: Sequence[str]) -> list[dict[str, Any]]:
        """Return each row's target and prediction as JSON; empty if the task predicts nothing for single rows."""
        if self.generated:
            rows = [asdict(row) for row in self.generated]
            return [{key: value for key, value in row.items() if key != "task" or value} for row in rows]
        return [
            {"label": _label_name(true, labels), "predicted": _label_name(guess, labels)}
            for true, guess in self.predictions
        ]


def _label_name(label: Any, names: Sequence[str]) -> Any:
    """Return the name of a label's index, or the names of a row's labels; anything else is returned unchanged."""
    if isinstance(label, list) and label and isinstance(label[0], int):
        return [name for name, is_set in zip(names, label, strict=True) if is_set]
    return names[label] if isinstance(label, int) else label


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
        """Build from sums by name (`models.heads.sums_of`)."""
        field_names = ("loss_sum", "weight", "correct")
        task_sums = {name: value for name, value in sums.items() if name not in field_names}
        return cls(sums["loss_sum"], sums["weight"], sums["correct"], task_sums)


def count_rows(split: Split, task: TaskConfig) -> int:
    """Count the evaluated rows: complete rows for tasks that split rows into several samples, else samples."""
    if split.origins is not None and whole_rows(split, task):
        return len(np.unique(split.origins))
    return len(split.lengths)


def whole_rows(split: Split, task: TaskConfig) -> bool:
    """Return whether metrics count complete rows, with all their samples."""
    member = task_of(task)
    return split.origins is not None and (member.chunked or member.splits_conversations)


def without_loss(metrics: dict[str, float]) -> dict[str, float]:
    """Drop loss and targets from an evaluation's metrics, since a training step reports them anyway."""
    return {name: value for name, value in metrics.items() if name not in ("loss", "targets")}


def with_registered(evaluation: Evaluation, task: Task, labels: tuple[str, ...]) -> Evaluation:
    """Add the metrics that plugins registered for `task` to `evaluation` (`dstune.protocols.Metric`)."""
    pairs = evaluation.predictions or tuple((row.target, row.answer) for row in evaluation.generated)
    registered = [METRICS[name]() for name in registered_metrics(task)]
    if not (registered and pairs):
        return evaluation
    targets, predictions = zip(*pairs, strict=True)
    registered_values = {
        entry.name: _number(entry, entry.compute(predictions, targets, labels)) for entry in registered
    }
    return replace(evaluation, metrics=evaluation.metrics | registered_values)


def _number(metric: Metric, value: Any) -> float:
    """Convert `value`, the result of `metric.compute`, to a float. Raises UserError if it is not a number."""
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        reason = f"compute() of the metric {metric.name} returned {type(value).__name__} instead of a number"
        raise UserError(Problem("plugins", reason, "return float(x)")) from error


def texts_of(split: Split) -> Iterator[dict[str, Any]]:
    """Yield the normalised content of each measured row, in order."""
    assert split.origins is not None and split.texts is not None, "the split has no texts of its rows"
    for number in np.unique(split.origins).tolist():
        yield json.loads(split.texts[number]["row"])


def rows_of(split: Split, outputs: Sequence[Row]) -> Iterator[list[Row]]:
    """Yield the samples of each row together, in order."""
    assert split.origins is not None, "only validation and test rows are measured"
    edges = np.flatnonzero(np.diff(split.origins)) + 1
    for start, end in zip([0, *edges], [*edges, len(outputs)], strict=True):
        yield list(outputs[start:end])
