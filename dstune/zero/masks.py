"""Trains only chosen entries of parameters: masks packed into bits, zeroed gradients elsewhere, masked weight decay."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from dstune.zero.parts import full_shape
from dstune.zero.restore import Partition

Change = Callable[[Partition, torch.Tensor, dict[str, Any]], None]
"""See `Engine.before_update`."""


def pack_bits(mask: torch.Tensor) -> torch.Tensor:
    """Pack a bool tensor into bits, uint8 [ceil(elements / 8)]."""
    flat = mask.reshape(-1).to(torch.uint8)
    flat = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).view(-1, 8)
    return (flat << torch.arange(8, dtype=torch.uint8, device=flat.device)).sum(dim=1, dtype=torch.uint8)


def unpack_bits(bits: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Restore the mask of `shape` that `pack_bits` packed into `bits`."""
    unpacked = (bits.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8, device=bits.device)) & 1
    return unpacked.view(-1)[: shape.numel()].view(shape).bool()


def zero_gradients(
    parameters: Mapping[str, nn.Parameter], masks: Mapping[str, torch.Tensor], device: torch.device
) -> None:
    """Zero the gradients of entries outside of the masks in every backward pass from now on."""
    packed = {name: pack_bits(mask).to(device) for name, mask in masks.items()}
    for name, bits in packed.items():
        shape = full_shape(parameters[name])
        parameters[name].register_hook(lambda gradient, bits=bits, shape=shape: gradient * unpack_bits(bits, shape))


def masked_weight_decay(
    masks: Mapping[str, torch.Tensor], partitions: Sequence[Partition], inner: torch.optim.Optimizer, *, decoupled: bool
) -> Change:
    """Disable the optimizer's weight decay, and return a function that applies it to entries inside of the masks.

    decoupled: as in AdamW; otherwise weight decay is added to the gradient.
    """
    mask_by_key: dict[int, torch.Tensor] = {}
    for partition in partitions:
        decays = torch.ones_like(partition.elements, dtype=torch.bool)
        for part in partition.fragments:
            if part.name in masks:
                chosen = masks[part.name].reshape(-1)[part.start : part.start + part.count]
                decays[part.offset : part.offset + part.count] = chosen.to(decays.device)
        mask_by_key[id(partition.key)] = decays
    for group in inner.param_groups:
        group["masked_decay"], group["weight_decay"] = group["weight_decay"], 0.0

    def decay(partition: Partition, gradient: torch.Tensor, group: dict[str, Any]) -> None:
        decays = mask_by_key[id(partition.key)]
        if decoupled:
            partition.elements.mul_(1 - group["lr"] * group["masked_decay"] * decays)
        else:
            gradient.add_(partition.elements * decays, alpha=group["masked_decay"])

    return decay
