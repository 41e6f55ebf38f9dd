"""Rules of task=token_classification."""

from __future__ import annotations

from collections.abc import Iterator

from dstune.config.schema import RunConfig
from dstune.config.task_rules import check_labels
from dstune.config.task_schema import TagScheme, TokenClassificationConfig
from dstune.errors import Problem


def check(config: RunConfig, task: TokenClassificationConfig) -> Iterator[Problem]:
    if task.labels:
        yield from check_labels(task.labels, least=2)
    if task.scheme is TagScheme.plain:
        if task.repair:
            reason = "only marks of entities can be repaired, and task.scheme=plain takes the tags as they are"
            yield Problem("task.repair", reason, "task.scheme=bio, or task.repair=false", "true")
        metric = config.trainer.early_stopping.metric
        if metric.startswith("entity_"):
            reason = "with task.scheme=plain there are no entities"
            yield Problem("trainer.early_stopping.metric", reason, "token_accuracy, f1_macro or loss", metric)
