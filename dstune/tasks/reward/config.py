"""The keys of `task=reward`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dstune.config.fields import setting
from dstune.protocols.task import TaskConfig


@dataclass(frozen=True)
class RewardConfig(TaskConfig):
    """A score for an answer, learnt from pairs of a better and a worse one."""

    name: str = "reward"
    template_date: str | None = setting(None, example="2026-01-31")
    """The date that a template may print (`YYYY-MM-DD`); frozen to the day of composition when not given."""
    chat_template_kwargs: dict[str, Any] = setting({})
    """Arguments of the chat template, for example `{enable_thinking: false}`; a row's own come before them."""
