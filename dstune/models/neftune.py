"""NEFTune: noise on the embeddings while a model trains (Jain et al. 2023, arXiv:2310.05914)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def add_noise(module: nn.Module, model: PreTrainedModel, alpha: float) -> None:
    """Add uniform noise of at most `alpha / sqrt(length * width)` to the embeddings in every training pass.

    length: tokens of the sample that a position belongs to, in padded and packed rows. The noise comes from torch's generator on
    the CPU, which the loop seeds by (seed, step, micro-batch), so it is the same on any number of ranks, on any device, and after a
    resume.

    module: the module that the engine calls, `model` with the method's parameters.
    """
    lengths: list[Tensor] = []

    def remember(_: nn.Module, arguments: Any, inputs: dict[str, Any]) -> None:
        lengths[:] = [_sample_lengths(inputs)]

    def disturb(layer: nn.Module, _: Any, embedded: Tensor) -> Tensor:
        if not module.training:
            return embedded
        largest = alpha / (lengths[0].unsqueeze(-1) * embedded.shape[-1]).clamp(min=1).sqrt()
        noise = (2 * torch.rand(embedded.shape) - 1).to(embedded.device) * largest.to(embedded.device)
        return embedded + noise.to(embedded.dtype)

    assert math.isfinite(alpha)
    module.register_forward_pre_hook(remember, with_kwargs=True)
    model.get_input_embeddings().register_forward_hook(disturb)


def _sample_lengths(inputs: dict[str, Any]) -> Tensor:
    """Return the number of tokens in each position's sample, float32 [rows, sequence]."""
    ids, mask, positions = (inputs.get(name) for name in ("input_ids", "attention_mask", "position_ids"))
    assert isinstance(ids, Tensor)
    if mask is not None and mask.dim() == 2:
        return mask.sum(dim=1, keepdim=True).expand_as(ids).float()
    if positions is None:
        return torch.full(ids.shape, float(ids.shape[1]))
    begins = (positions == 0).long().cumsum(dim=1)  # packed rows: the number of the sample in its row
    return torch.stack([torch.bincount(row)[row] for row in begins]).float()
