"""What `trainer.precision=auto` is on a device: the plan of a run and its ranks come to the same answer."""

from __future__ import annotations

from dataclasses import replace

from dstune.config.schema import Precision, RunConfig, stage_of
from dstune.config.validate import permits

FIRST_BF16 = (8, 0)
"""Compute capability of Ampere, the first of CUDA's devices whose tensor cores know bf16."""
FIRST_FP16 = (7, 0)
"""Of Volta, the first with tensor cores."""


def automatic(config: RunConfig, *, fast_bf16: bool, capability: tuple[int, int] | None) -> Precision:
    """Choose the precision of `trainer.precision=auto`. fast_bf16: whether the device computes bf16 matrix products at least as
    fast as fp32 ones. capability: CUDA's compute capability; None of other devices."""
    # DeepSpeed's stage 0 makes an optimizer step with zero gradients at initialisation in bf16, so it stays in fp32.
    if stage_of(config.zero) == 0:
        return Precision.fp32
    if fast_bf16:
        return Precision.bf16
    # The tensor cores of Volta and Turing know fp16 alone; not every run can train in it.
    in_fp16 = replace(config, trainer=replace(config.trainer, precision=Precision.fp16))
    knows_fp16 = capability is not None and FIRST_FP16 <= capability < FIRST_BF16
    return Precision.fp16 if knows_fp16 and permits(config, in_fp16) else Precision.fp32
