"""Heads: what a task computes from a batch, which is the sum of its losses and the inputs of its metrics.

`task_of(config.task).head` builds a task's head. A head gets `forward` (DeepSpeed's engine, or a plain model in tests) and a
batch. It never divides the sums, since only the trainer knows the weight of the global batch.
"""

from __future__ import annotations

from dstune.models.heads.base import (
    Batch,
    Forward,
    GlobalBatchHead,
    Head,
    HeadOutput,
    Rows,
    numbers,
    on_device,
    sums_of,
)

__all__ = ["Batch", "Forward", "GlobalBatchHead", "Head", "HeadOutput", "Rows", "numbers", "on_device", "sums_of"]
