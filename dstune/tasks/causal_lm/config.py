"""The keys of `task=causal_lm`."""

from __future__ import annotations

from dataclasses import dataclass

from dstune.protocols.task import TaskConfig


@dataclass(frozen=True)
class CausalLmConfig(TaskConfig):
    """Plain text; the loss is on every token and on the end of each document."""

    name: str = "causal_lm"
