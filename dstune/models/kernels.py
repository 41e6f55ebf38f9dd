"""Chooses the implementation of each operation for a run, and names it for `environment.json` and `dstune doctor`."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn

from dstune.config.schema import ModelConfig
from dstune.models import varlen
from dstune.models.attention import SamplesApart
from dstune.models.compiled import compiled_functions, use_compiled
from dstune.models.cross_entropy import is_multiplied_once, rows_at_once, supports_fp32_products
from dstune.models.heads.base import LeavesOutLogits
from dstune.models.norms import NO_KERNEL, Kind, is_as_exact, norms_computed_here, use_lean_norms
from dstune.models.packed_attention import Heads, choose
from dstune.zero import accelerator
from dstune.zero.precision import fast_bf16

HEADS, VOCABULARY, WIDTH, EPSILON = Heads(32, 8), 128_256, 4096, 1e-5
"""Sizes of Llama 3 8B."""


def use_kernels(module: nn.Module, config: ModelConfig, message: Callable[[str], None] = lambda text: None) -> None:
    """Choose the implementations of a model's layers as `config` requests. Call it before DeepSpeed installs hooks on the modules,
    and after peft has copied the modules that it trains beside adapters."""
    use_lean_norms(module, fused=config.fused_norms)
    for reason in use_compiled(module, config):
        message(f"warning: {reason}")


def of_run(module: nn.Module, model: Any, head: Any, optimizer: torch.optim.Optimizer) -> dict[str, str]:
    """Describe the implementation of each operation in a run, after the checks at its start. model: transformers' model within
    `module`."""
    rows = getattr(head, "rows", None)
    loaded = getattr(getattr(model, "config", None), "_attn_implementation", None)  # features have no model
    parts = {"attention": str(loaded) if rows is None else rows.title}
    by_kernel, by_blocks, kinds = norms_computed_here(module)
    if by_kernel or by_blocks:
        parts["norms"] = _norms(fused=by_kernel > 0, kinds=kinds)
    parts |= {name: _written(compiled=is_compiled) for name, is_compiled in compiled_functions(module).items()}
    if isinstance(head, LeavesOutLogits):
        parts["cross_entropy"] = "whole logits"
        if head.examined:
            parts["cross_entropy"] = _chunks(model.get_output_embeddings(), model.dtype)
    return parts | {"optimizer": _optimizer(optimizer)}


def of_machine() -> dict[str, str]:
    """Return the kernels that a chat run of Llama 3 8B would use on this machine, at `trainer.precision=auto`."""
    dtype = torch.bfloat16 if fast_bf16() else torch.float16 if accelerator.capability() else torch.float32
    parts = {"attention": SamplesApart.title}
    if accelerator.present():
        parts["attention"] = _attention(dtype)
    fused = accelerator.present() and is_as_exact(Kind.rounded, EPSILON, WIDTH, dtype)
    adamw = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], fused=True)  # as `dstune.optim.adamw`
    return parts | {
        "norms": _norms(fused=fused),
        "activations": _written(compiled=False),
        "rotary": _written(compiled=False),
        "cross_entropy": _chunks(nn.Linear(WIDTH, VOCABULARY, bias=False, device="meta"), dtype),
        "optimizer": _optimizer(adamw),
    }


def _attention(dtype: torch.dtype) -> str:
    """Name the attention kernel that packed rows would use; kernels that have to be compiled first are named but not tried."""
    if dtype is torch.float32:
        return "sdpa"
    kernels = list(varlen.kernels())
    kernel, given_up = choose((kernel_choice for kernel_choice in kernels if not kernel_choice.compiled), HEADS, dtype)
    untried = [f"{kernel_choice.name} where it compiles" for kernel_choice in kernels if kernel_choice.compiled]
    chosen = [kernel.name] if kernel is not None else [*untried, "sdpa"][:1]
    return ", ".join([*chosen, *(f"not {problem}" for problem in given_up)])


def _norms(*, fused: bool, kinds: Collection[Kind] = ()) -> str:
    """Name the implementation of the norms. kinds: kinds of norms that have no kernel."""
    reasons = [NO_KERNEL[kind] for kind in kinds if kind in NO_KERNEL and accelerator.present()]
    return ("torch's kernel" if fused else "blocks of rows") + "".join(f" ({reason})" for reason in reasons)


def _written(*, compiled: bool) -> str:
    return "one compiled kernel" if compiled else "the model's own"


def _chunks(projection: nn.Module, dtype: torch.dtype) -> str:
    device = accelerator.current()
    rows = rows_at_once(projection, torch.empty(0, device=device, dtype=dtype))
    wide = is_multiplied_once(projection, dtype) and supports_fp32_products(device.type, dtype)
    logits = str(torch.float32 if wide else dtype).removeprefix("torch.")
    return f"{'one chunk' if rows is None else f'chunks of {rows} targets'}, logits in {logits}"


def _optimizer(optimizer: torch.optim.Optimizer) -> str:
    fused = " fused" if any(group.get("fused") for group in optimizer.param_groups) else ""
    return f"{type(optimizer).__module__.partition('.')[0]} {type(optimizer).__name__}{fused}"
