"""Rules of `data.augment`."""

from __future__ import annotations

from collections.abc import Iterator

from dstune.config.convert import format_value
from dstune.config.schema import RunConfig
from dstune.core.errors import Problem
from dstune.protocols import task_of


def check_augment(config: RunConfig) -> Iterator[Problem]:
    augment, task = config.data.augment, task_of(config.task)
    for key in ("delete", "swap", "synonyms", "models"):
        value = getattr(augment, key)
        if value and not augment.on:
            reason = "this changes augmented copies of training rows, and none are made"
            yield Problem(f"data.augment.{key}", reason, "data.augment.copies=1", format_value(value))
    if augment.models and augment.prompt.count("{text}") != 1:
        reason = "the prompt must contain {text} exactly once"
        yield Problem("data.augment.prompt", reason, "\"data.augment.prompt='Paraphrase: {text}'\"", augment.prompt)
    if not augment.on:
        return
    key, value = ("copies", format_value(augment.copies)) if augment.copies else ("balance", "true")
    if augment.copies and not augment.changes:
        reason = "the copies would equal their rows"
        yield Problem("data.augment.copies", reason, "data.augment.delete=0.1, swap, synonyms or models", value)
    if not task.same_label_when_reworded:
        reason = f"task={task.name} learns or answers the text itself, so a changed copy needs another target"
        yield Problem(f"data.augment.{key}", reason, "leave out data.augment, or task=classification", value)
    elif augment.balance and (task.several_labels or not task.has_labels):
        kind = "multi_label" if task.several_labels else "regression"
        yield Problem("data.augment.balance", f"with task.{kind} a row has no single class", "leave it out", "true")
    if config.data.streaming:
        reason = "copies are compared with held-out rows and with each other, which needs all rows at once"
        yield Problem(f"data.augment.{key}", reason, "data.streaming=false", value)
