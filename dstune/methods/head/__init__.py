"""method=head: only the task's head is trained; the body stays frozen."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from dstune.config.convert import format_value
from dstune.config.schema import RunConfig
from dstune.core.errors import Problem
from dstune.methods._pooled import PooledHead, Pooling
from dstune.methods.head.config import HeadConfig
from dstune.protocols import method, task_of

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


@method
class Head(PooledHead):
    Config = HeadConfig
    config: HeadConfig

    def check(self, run: RunConfig) -> Iterator[Problem]:
        config, task = self.config, task_of(run.task)
        if not task.has_head:
            yield Problem("method", f"task={task.name} has no head of its own", "method=full or method=lora", "head")
        if config.pooling is Pooling.model:
            for key, value in (("layers", config.layers), ("dropout", config.dropout)):
                if value:
                    reason = "method.pooling=model uses the architecture's own head, which this key does not change"
                    yield Problem(f"method.{key}", reason, "method.pooling=mean, cls or last", format_value(value))
        elif task.has_head and task.unpoolable:
            yield Problem("method.pooling", task.unpoolable, "method.pooling=model", config.pooling.name)

    def apply(self, model: PreTrainedModel, run: RunConfig) -> nn.Module:
        from dstune.methods.head.apply import freeze_body

        freeze_body(model)
        return model
