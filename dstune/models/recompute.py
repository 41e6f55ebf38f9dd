"""Decides what activation checkpointing keeps of a layer: only its input, or also what is expensive to compute again.

Selective checkpointing decides for each operation: it keeps the outputs of matrix products and of fused attention, and computes
everything between them again (norms, rotations, activation functions, their products). A Llama layer then keeps 25 bytes instead
of 44 for each position and unit of width in bf16, without repeating a matrix product. Full checkpointing keeps 2 bytes and
computes everything again, a third more arithmetic. Attention that is not fused has scores for all pairs of positions: they are
computed again, as in Korthikanti et al. 2022 (arXiv:2205.05198, section 5).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from dstune.config.schema import Selective

PRODUCTS = {"aten::mm", "aten::addmm"}
"""Without those of stacked experts (`_grouped_mm`): some models add a bias to their output in place, which torch refuses for kept
outputs."""
ATTENTION = {
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "flash_attn::_flash_attn_forward",
    "flash_attn::_flash_attn_varlen_forward",
    "flash_attn_3::_flash_attn_forward",
    "flash_attn_3::fwd",  # in earlier versions
    "torch_attn::_varlen_attn",
}
SPREAD = 16
"""Products with more than this many outputs for each input are computed again: the second matrix of a low-rank adapter has as many
outputs as its layer, from only `rank` inputs for each position."""


def checkpointing_options(chosen: bool | Selective) -> dict[str, Any]:
    """Return the arguments that transformers passes to `torch.utils.checkpoint` for every layer."""
    options: dict[str, Any] = {"use_reentrant": False}
    if isinstance(chosen, Selective):
        options["context_fn"] = partial(create_selective_checkpoint_contexts, policy)
    return options


def policy(context: Any, operation: Any, *arguments: Any, **keywords: Any) -> CheckpointPolicy:
    """Return whether to keep the output of one operation. Only its name and shapes decide, which are the same in both passes."""
    name = operation.name().split(".")[0]
    if name in ATTENTION:
        return CheckpointPolicy.MUST_SAVE
    if name in PRODUCTS:
        tensors = [argument for argument in arguments if isinstance(argument, torch.Tensor)]
        *_, first_factor, second_factor = tensors
        if second_factor.shape[-1] <= SPREAD * first_factor.shape[-1]:
            return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
