"""Chooses the precision for `trainer.precision=auto`, so that the plan of a run and its ranks come to the same answer."""

from __future__ import annotations

from dataclasses import replace

from dstune.config.schema import Precision, RunConfig, stage_of
from dstune.config.validate import permits

FIRST_BF16 = (8, 0)
"""Compute capability of Ampere, the first CUDA devices whose tensor cores support bf16."""
FIRST_FP16 = (7, 0)
"""Compute capability of Volta, the first with tensor cores, which support only fp16."""


def automatic(config: RunConfig, *, fast_bf16: bool, capability: tuple[int, int] | None) -> Precision:
    """Return the precision for `trainer.precision=auto`.

    fast_bf16: whether the device computes bf16 matrix products at least as fast as fp32 ones. capability: CUDA's compute
    capability; None for other devices.
    """
    # DeepSpeed's stage 0 makes an optimizer step with zero gradients at initialisation in bf16, so it stays in fp32.
    if stage_of(config.zero) == 0:
        return Precision.fp32
    if fast_bf16:
        return Precision.bf16
    # Not every run can train in fp16, the only half precision of Volta and Turing.
    in_fp16 = replace(config, trainer=replace(config.trainer, precision=Precision.fp16))
    has_only_fp16 = capability is not None and FIRST_FP16 <= capability < FIRST_BF16
    return Precision.fp16 if has_only_fp16 and permits(config, in_fp16) else Precision.fp32
