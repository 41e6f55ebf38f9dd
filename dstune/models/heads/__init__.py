"""What a task computes from a batch: the sum of its losses and what its metrics need. `task_of(config.task).head` builds it.

A head gets `forward` (DeepSpeed's engine, or a plain model in tests) and a batch; it never divides by anything, because
the weight of a global batch is known to the trainer only.
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
