"""What activation checkpointing keeps of a layer: its input alone, or also what is dear to compute again.

The selective way goes operation by operation, as torch's selective checkpointing lets it: outputs of matrix products and of fused
attention are kept, everything between them (norms, rotations, activation functions, their products) is computed again. A Llama
layer keeps 25 bytes in place of 44 for each position and unit of width in bf16, without a second product of matrices; the whole
way keeps 2 and computes all again, a third more arithmetic. Attention that is not fused has scores of all pairs of positions:
they are computed again, as Korthikanti et al. 2022 (arXiv:2205.05198, section 5) do.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from dstune.config.schema import Selective

PRODUCTS = {"aten::mm", "aten::addmm"}
"""Not those of stacked experts (`_grouped_mm`): some models add a bias to it in place, which torch refuses of what is kept."""
ATTENTION = {
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "flash_attn::_flash_attn_forward",
    "flash_attn::_flash_attn_varlen_forward",
    "flash_attn_3::_flash_attn_forward",
    "flash_attn_3::fwd",  # of earlier versions
    "torch_attn::_varlen_attn",
}
SPREAD = 16
"""Products that make more than so many outputs of each input are computed again: the second matrix of a low-rank adapter makes as
many as the layer that it is beside, out of `rank` numbers for each position."""


def checkpointing_options(chosen: bool | Selective) -> dict[str, Any]:
    """Return what transformers hands to `torch.utils.checkpoint` for every layer."""
    options: dict[str, Any] = {"use_reentrant": False}
    if isinstance(chosen, Selective):
        options["context_fn"] = partial(create_selective_checkpoint_contexts, policy)
    return options


def policy(context: Any, operation: Any, *arguments: Any, **keywords: Any) -> CheckpointPolicy:
    """Return whether the output of one operation is kept. It depends on shapes alone, which are the same both times."""
    name = operation.name().split(".")[0]
    if name in ATTENTION:
        return CheckpointPolicy.MUST_SAVE
    if name in PRODUCTS:
        tensors = [argument for argument in arguments if isinstance(argument, torch.Tensor)]
        *_, first_factor, second_factor = tensors
        if second_factor.shape[-1] <= SPREAD * first_factor.shape[-1]:
            return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
