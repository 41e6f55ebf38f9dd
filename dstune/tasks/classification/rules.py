"""Rules of task=classification."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

from dstune.config.convert import format_value
from dstune.config.schema import RunConfig
from dstune.config.task_rules import check_labels
from dstune.core.errors import Problem, UserError
from dstune.tasks.classification.config import ClassificationConfig


def check(config: RunConfig, task: ClassificationConfig) -> Iterator[Problem]:
    if task.labels:
        yield from check_labels(task.labels, least=1 if task.multi_label else 2)
    weighted = [
        (key, value) for key, value in (("class_weights", task.class_weights), ("balanced", task.balanced)) if value
    ]
    if task.regression:
        others = [
            ("multi_label", task.multi_label),
            ("labels", task.labels),
            ("focal_gamma", task.focal_gamma),
            *weighted,
        ]
        for key, value in others:
            if value:
                reason = "with task.regression the label is a number, and there are no classes"
                yield Problem(
                    f"task.{key}", reason, f"leave out task.{key}, or task.regression=false", format_value(value)
                )
    elif task.multi_label:
        for key, value in weighted:
            reason = "with task.multi_label a row is of several classes, and has no weight of one of them"
            yield Problem(f"task.{key}", reason, f"leave out task.{key}", format_value(value))
    if len(weighted) > 1:
        reason = "the weights are given by task.class_weights already"
        yield Problem("task.balanced", reason, "task.balanced=false, or leave out task.class_weights", "true")
    if task.balanced and config.data.streaming:
        reason = "how many rows of a stream each class has is not known before its end"
        yield Problem("task.balanced", reason, "task.class_weights={NAME: WEIGHT}", "true")
    for name, weight in task.class_weights.items():
        if not (math.isfinite(weight) and weight > 0):
            yield Problem(
                f"task.class_weights.{name}", "a weight is more than 0", "for example 2.0", format_value(weight)
            )
        if task.labels and name not in task.labels:
            reason = f"no such label: task.labels are {', '.join(task.labels)}"
            yield Problem(f"task.class_weights.{name}", reason, "use the names of task.labels", format_value(weight))


def class_weights(
    task: ClassificationConfig, labels: tuple[str, ...], counts: Callable[[], Mapping[str, int]], rows: int
) -> list[float]:
    """Return the weight of each label; see `Task.class_weights`. Raises UserError for a weighted label that no row has."""
    if not (task.class_weights or task.balanced):
        return []
    unknown = [name for name in task.class_weights if name not in labels]
    if unknown:
        reason = f"no row has this label; they have {', '.join(labels)}"
        raise UserError(Problem(f"task.class_weights.{name}", reason, "use their names") for name in unknown)
    if not task.balanced:
        return [task.class_weights.get(label, 1.0) for label in labels]
    count_by_label = counts()
    # A class without training rows cannot be balanced, and only held-out rows could need its weight.
    return [rows / (len(labels) * count_by_label[label]) if count_by_label[label] else 1.0 for label in labels]
