"""The typed configuration of `task`: what rows hold, and what loss and metrics are made of them."""

from __future__ import annotations

from dataclasses import dataclass

from dstune.config.fields import setting


@dataclass(frozen=True)
class ChatConfig:
    """Conversations; the loss is on the assistant's tokens, the end of each turn included."""

    name: str = "chat"
    template_date: str | None = None
    """The date that a template may print (`YYYY-MM-DD`); frozen to the day of composition when not given."""
    train_on_prompt: bool = False
    """Let every token count in the loss, not only those of the assistant."""


@dataclass(frozen=True)
class CausalLmConfig:
    """Plain text; the loss is on every token and on the end of each document."""

    name: str = "causal_lm"


@dataclass(frozen=True)
class ClassificationConfig:
    """A label, or several, for a text or a pair of texts."""

    name: str = "classification"
    labels: list[str] = setting([])
    """Label names in the order of their indices; found in the training rows when empty."""
    multi_label: bool = False
    """Any number of labels for a row, each decided by itself (binary cross entropy, threshold 0.5)."""


TaskConfig = ChatConfig | CausalLmConfig | ClassificationConfig

TASKS: dict[str, type] = {"chat": ChatConfig, "causal_lm": CausalLmConfig, "classification": ClassificationConfig}
"""Classes of the group by the name of the choice."""
