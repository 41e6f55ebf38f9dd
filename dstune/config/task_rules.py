"""Rules that several tasks share; each task's own rules are in its room (`dstune/tasks/TASK/rules.py`)."""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Sequence

from dstune.chat_templates import PROMPTS
from dstune.config.convert import format_value
from dstune.config.schema import RunConfig
from dstune.core.errors import Problem
from dstune.protocols import method_of, task_of


def check_task(config: RunConfig) -> Iterator[Problem]:
    task = task_of(config.task)
    if task.template_date is not None:
        try:
            valid = datetime.date.fromisoformat(task.template_date).isoformat() == task.template_date
        except ValueError:
            valid = False
        if not valid:
            yield Problem(
                "task.template_date",
                "this is not a date",
                "write it as YYYY-MM-DD, or leave it out",
                format_value(task.template_date),
            )
    if (name := config.model.prompt_template) is not None:
        choices = f"one of {', '.join(PROMPTS)}"
        if name not in PROMPTS:
            yield Problem("model.prompt_template", f"expected {choices}", "model.prompt_template=alpaca", name)
        if config.model.chat_template is not None:
            reason = "model.chat_template already says how conversations are rendered"
            yield Problem("model.prompt_template", reason, "leave one of the two out", name)
    yield from task.check(config)
    if task.whole_batch_loss:
        yield from _check_scores(config)


def check_labels(labels: Sequence[str], *, least: int) -> Iterator[Problem]:
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        reason = f"given more than once: {', '.join(twice)}"
        yield Problem("task.labels", reason, "name each label once", format_value(labels))
    if len(labels) < least:
        yield Problem("task.labels", "one label leaves nothing to decide", "name two or more", format_value(labels))
    if not all(label.strip() for label in labels):
        yield Problem("task.labels", "a label is empty", "give each a name", format_value(labels))


def _check_scores(config: RunConfig) -> Iterator[Problem]:
    """Yield settings that score weights by the gradients of single micro-batches at the start weights, without a reference
    model: the losses of some tasks have no such gradient."""
    reason = f"task={config.task.name} has no gradient of a single micro-batch: its loss needs the complete step or a second model"
    if method_of(config.method).scores_gradients:
        yield Problem("method", reason, "method=full or method=lora", config.method.name)
    if config.forgetting.ewc:
        yield Problem(
            "forgetting.ewc", reason, "forgetting.ewc=0, or forgetting.l2sp", format_value(config.forgetting.ewc)
        )
