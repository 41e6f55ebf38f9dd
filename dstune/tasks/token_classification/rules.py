"""Rules of task=token_classification."""

from __future__ import annotations

from collections.abc import Iterator

from dstune.config.schema import RunConfig
from dstune.config.task_rules import check_labels
from dstune.core.errors import Problem, UserError
from dstune.data.tags import OUTSIDE, TagScheme, is_bio, marks_entities
from dstune.tasks.token_classification.config import TokenClassificationConfig


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


def refuse_odd_tags(task: TokenClassificationConfig, labels: tuple[str, ...]) -> None:
    """Raises UserError where a few tags are no marks of entities and all others are: one that is mistyped would make them all
    tags of single words, measured by another metric."""
    odd = [label for label in labels if not is_bio([label])]
    marks = [label for label in labels if label not in odd and label != OUTSIDE]
    if task.scheme is TagScheme.auto and odd and OUTSIDE in labels and len(odd) < len(marks):
        reason = f"the tags mark entities ({', '.join(marks[:3])}), except {', '.join(odd[:5])}"
        fix = "task.scheme=bio names the rows, task.scheme=plain takes all for tags of single words"
        raise UserError(Problem("task.scheme", reason, fix, "auto"))


def refuse_other_metric(config: RunConfig, task: TokenClassificationConfig, labels: tuple[str, ...]) -> None:
    """Raises UserError where these tags have no such metric, before anything is trained."""
    metric, entities = config.trainer.early_stopping.metric, marks_entities(labels, task.scheme)
    if metric.startswith("entity_") and not entities:
        reason, fix = "the tags are no marks of entities", "token_accuracy, f1_macro or loss"
    elif metric == "f1_macro" and entities:
        reason, fix = "the tags are marks of entities, which are measured as a whole", "entity_f1"
    else:
        return
    raise UserError(Problem("trainer.early_stopping.metric", reason, fix, metric))
