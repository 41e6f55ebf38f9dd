"""Chooses the number format that a run computes in."""

from __future__ import annotations

import os

import torch

from dstune.config.precision import automatic
from dstune.config.schema import Precision, RunConfig, TrainerConfig
from dstune.core.errors import Problem, UserError
from dstune.planning import host
from dstune.zero import accelerator

DTYPES = {Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16, Precision.fp16: torch.float16}


def fast_bf16() -> bool:
    """Return whether this machine computes bf16 matrix products at least as fast as fp32 ones.

    A CPU without AMX or AVX512-BF16 emulates them: 1.2 against 86 GFLOP/s per core on a Zen CPU with AVX2.
    """
    if accelerator.present():
        return accelerator.has_bf16()
    return host.fast_bf16()


def resolve(config: RunConfig) -> Precision:
    """Return `trainer.precision`, with `auto` resolved by the hardware.

    Raises UserError if the hardware does not support the requested precision.
    """
    requested = config.trainer.precision
    if requested is Precision.auto:
        return automatic(config, fast_bf16=fast_bf16(), capability=accelerator.capability())
    if requested is Precision.fp16 and not accelerator.present():
        raise UserError(
            Problem(
                "trainer.precision",
                value="fp16",
                reason="fp16 is trained on GPUs only: a CPU has no fp16 kernels for several layers",
                fix="trainer.precision=fp32 (or bf16)",
            )
        )
    if requested is Precision.bf16 and accelerator.present() and not accelerator.has_bf16():
        raise UserError(
            Problem(
                "trainer.precision",
                value="bf16",
                reason=f"{accelerator.name()} has no bf16",
                fix="trainer.precision=fp16 or fp32",
            )
        )
    return requested


def set_arithmetic(trainer: TrainerConfig) -> None:
    """Apply `trainer.tf32` and `trainer.deterministic` to this process. Call it before the first matrix product."""
    if trainer.tf32 and accelerator.present():
        torch.set_float32_matmul_precision("high")
    if trainer.deterministic:
        # cuBLAS is deterministic with a fixed workspace only.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
