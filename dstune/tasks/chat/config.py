"""The keys of `task=chat`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

from dstune.config.fields import setting
from dstune.protocols.task import TaskConfig


class Turns(Enum):
    auto = "auto"
    all = "all"
    last = "last"


class Reasoning(Enum):
    keep = "keep"
    drop = "drop"
    inline = "inline"


@dataclass(frozen=True)
class ChatConfig(TaskConfig):
    """Conversations; the loss is on the assistant's tokens, the end of each turn included."""

    name: str = "chat"
    template_date: str | None = setting(None, example="2026-01-31")
    """The date that a template may print (`YYYY-MM-DD`); frozen to the day of composition when not given."""
    train_on_prompt: bool = False
    """Let every token count in the loss, not only those of the assistant."""
    turns: Turns = Turns.auto
    """Which of the assistant's turns are trained: `auto` (every one, or those that the template marks with
    `{% generation %}`), `all`, or `last`."""
    reasoning: Reasoning = Reasoning.keep
    """`keep` what the assistant thinks before it answers, `drop` it from every message, or write it `inline`, at the beginning
    of the content, where the chat template has no field for it."""
    reasoning_marks: list[str] = setting([])
    """With `reasoning=inline`: the text that opens reasoning and the one that closes it, for example
    `[<think>,</think>]`; those of the chat template or the vocabulary when not given."""
    chat_template_kwargs: dict[str, Any] = setting({})
    """Arguments of the chat template, for example `{enable_thinking: false}`; a row's own come before them. Where nobody
    says, the model is told to think in turns that have reasoning."""
