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
            reason = "it changes copies of training rows, and there are none"
            yield Problem(f"data.augment.{key}", reason, "data.augment.copies=1", format_value(value))
    if augment.models and augment.prompt.count("{text}") != 1:
        reason = "the text has to have one place in the prompt"
        yield Problem("data.augment.prompt", reason, "\"data.augment.prompt='Paraphrase: {text}'\"", augment.prompt)
    if not augment.on:
        return
    key, value = ("copies", format_value(augment.copies)) if augment.copies else ("balance", "true")
    if augment.copies and not augment.changes:
        reason = "the copies would equal their rows"
        yield Problem("data.augment.copies", reason, "data.augment.delete=0.1, swap, synonyms or models", value)
    if not task.same_label_when_reworded:
        reason = f"with task={task.name} a changed text would be one to learn or to answer, not one with the same label"
        yield Problem(f"data.augment.{key}", reason, "leave out data.augment, or task=classification", value)
    elif augment.balance and (task.several_labels or not task.has_labels):
        kind = "multi_label" if task.several_labels else "regression"
        yield Problem("data.augment.balance", f"with task.{kind} a row has no single class", "leave it out", "true")
    if config.data.streaming:
        reason = "the rows of a stream are not known as a whole, so copies cannot be held against held-out ones and each other"
        yield Problem(f"data.augment.{key}", reason, "data.streaming=false", value)
