"""Which implementation computes what, for `environment.json` and `dstune doctor`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dstune.models import varlen
from dstune.models.cross_entropy import chunk_rows, vocabulary_size, wide_products
from dstune.models.heads.language import CausalLmHead
from dstune.models.norms import fused_norms
from dstune.zero import accelerator


def of_run(module: nn.Module, model: Any, head: Any, optimizer: torch.optim.Optimizer) -> dict[str, str]:
    """By operation, as a run has chosen it and the proofs at its start have left it. model: transformers' within `module`."""
    attention = getattr(getattr(model, "config", None), "_attn_implementation", None)  # features have no model
    found = {"attention": str(attention), "optimizer": _optimizer(optimizer)}
    rows = getattr(head, "rows", None)
    if rows is not None:
        found["attention"] = rows.kernel.name if isinstance(rows, varlen.PackedAttention) else rows.NAME
    if count := fused_norms(module):
        found["norms"] = f"torch's kernel ({count})"
    if isinstance(head, CausalLmHead):
        found["cross_entropy"] = _cross_entropy(head, model)
    return found


def _optimizer(optimizer: torch.optim.Optimizer) -> str:
    fused = " fused" if any(group.get("fused") for group in optimizer.param_groups) else ""
    return f"{type(optimizer).__module__.partition('.')[0]} {type(optimizer).__name__}{fused}"


def _cross_entropy(head: CausalLmHead, model: Any) -> str:
    if not head.examined:
        return "whole logits"
    device = accelerator.current()
    hidden = torch.empty(0, device=device, dtype=model.dtype)
    rows = chunk_rows(hidden, vocabulary_size(model.get_output_embeddings()))
    wide = wide_products(device.type, model.dtype)
    return f"chunks of {rows} targets, logits in {'fp32' if wide else str(model.dtype).removeprefix('torch.')}"


def of_machine() -> dict[str, str]:
    """What a language model in bf16 would be computed by here."""
    if not accelerator.present():
        return {"attention": "samples one by one", "norms": "blocks of rows", "cross entropy": "chunks"}
    packed = [kernel.name for kernel in varlen.kernels()]
    wide = wide_products(accelerator.kind(), torch.bfloat16)
    return {
        "attention": f"{packed[0]} (then {', '.join([*packed[1:], 'sdpa'])})" if packed else "sdpa",
        "norms": "torch's kernel where it is as exact as the model's own",
        "cross entropy": f"chunks, logits in {'fp32' if wide else 'bf16'}",
    }
