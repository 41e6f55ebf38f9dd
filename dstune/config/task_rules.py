"""Rules of `task`: what the other keys may not say beside it, and what fits together among its own."""

from __future__ import annotations

import datetime
from collections.abc import Iterator

from dstune.config.convert import shown
from dstune.config.schema import RunConfig
from dstune.config.task_schema import ChatConfig, ClassificationConfig
from dstune.errors import Problem


def check_task(config: RunConfig) -> Iterator[Problem]:
    task = config.task
    if isinstance(task, ChatConfig) and task.template_date is not None:
        try:
            valid = datetime.date.fromisoformat(task.template_date).isoformat() == task.template_date
        except ValueError:
            valid = False
        if not valid:
            yield Problem(
                "task.template_date",
                "this is no date",
                "write it as YYYY-MM-DD, or leave it out",
                shown(task.template_date),
            )
    if isinstance(task, ClassificationConfig) and task.labels:
        twice = sorted({label for label in task.labels if task.labels.count(label) > 1})
        if twice:
            reason = f"given more than once: {', '.join(twice)}"
            yield Problem("task.labels", reason, "name each label once", shown(task.labels))
        if len(task.labels) < 2 and not task.multi_label:
            yield Problem("task.labels", "one label leaves nothing to decide", "name two or more", shown(task.labels))
        if not all(label.strip() for label in task.labels):
            yield Problem("task.labels", "a label is empty", "give each a name", shown(task.labels))
