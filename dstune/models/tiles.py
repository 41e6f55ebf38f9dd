"""Computes feed-forward layers a piece of the positions at a time, for rows so long that one layer's inner tensors are the peak.

A feed-forward layer looks at one position at a time, and its inner tensors are several times as wide as its input and output:
4 x 3.5 widths in Llama 8B. If each piece is computed again in the backward pass, only one piece's inner tensors exist at a time
(the tiled MLP of Arctic Long Sequence Training, Bekman et al. 2025, arXiv:2506.13996, section 3.1).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dstune.config.validate import TILED, tiles_problem
from dstune.core.errors import UserError

Forward = Callable[[torch.Tensor], torch.Tensor]


def tile_feed_forward(model: nn.Module, tiles: int) -> int:
    """Let the feed-forward layers of `model` compute in `tiles` pieces; return the number of these layers. All ranks have equally
    many pieces, whatever their rows: at ZeRO-3 each piece gathers weights.

    Raises UserError if the model has no such layer.
    """
    layers = [
        module
        for module in model.modules()
        if all(isinstance(getattr(module, part, None), nn.Module) for part in TILED)
    ]
    if not layers:
        raise UserError(tiles_problem(type(model).__name__, tiles))
    for module in layers:
        module.forward = partial(_tiled, module.forward, tiles)
    return len(layers)


def _tiled(forward: Forward, tiles: int, hidden: torch.Tensor) -> torch.Tensor:
    """Compute a layer in tiles. hidden: [rows, positions, width]."""
    if not torch.is_grad_enabled():
        return forward(hidden)
    pieces = hidden.tensor_split(tiles, dim=-2)
    return torch.cat([checkpoint(forward, piece, use_reentrant=False) for piece in pieces], dim=-2)
