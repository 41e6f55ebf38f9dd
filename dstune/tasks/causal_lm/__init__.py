"""task=causal_lm: plain text; the loss is on every token and on the end of each document."""

from __future__ import annotations

from dstune.config.task_schema import CausalLmConfig
from dstune.protocols import Task, task


@task
class CausalLm(Task):
    Config = CausalLmConfig
    config: CausalLmConfig
