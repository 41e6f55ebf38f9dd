"""Names of the weights files that ranks write, and the buffers that these files hold besides weights."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

BUFFER = "buffer:"
"""Prefix of the names of buffers in the files of `Engine.save_weights`."""


def weights_file(rank: int | str, part: int = 0) -> str:
    """Return the name of a rank's weights file; with `*` as the rank, a pattern for the files of all ranks. part: number of the
    file, if an engine that `swaps` writes several."""
    return (
        f"weights-rank-{rank if isinstance(rank, str) else f'{rank:05d}'}{f'.{part:05d}' if part else ''}.safetensors"
    )


def persistent_buffers(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the buffers that belong to a module's state, by name."""
    saved = module.state_dict(keep_vars=True)
    for name, buffer in module.named_buffers():
        if name in saved:
            yield name, buffer
