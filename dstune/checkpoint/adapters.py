"""The tensors of adapters in a checkpoint: finds their modules, and merges them into weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dstune.checkpoint.shards import Weights
from dstune.zero.parts import gathered

ADAPTED = "base_model.model."
"""Prefix that peft adds to the names of the model that it wraps."""


def adapters_by_module(names: Iterable[str], marks: Sequence[str]) -> dict[str, list[str]]:
    """Return the names of each adapter's tensors, by the module that it adapts. marks: `tensor_marks` of the method."""
    names_by_module: dict[str, list[str]] = {}
    for name in names:
        for mark in marks:
            owner, separator, _ = name.partition(mark)
            if separator:
                names_by_module.setdefault(owner.removeprefix(ADAPTED), []).append(name)
    return names_by_module


def fill(module: nn.Module, prefix: str, names: Iterable[str], trained: Mapping[str, Tensor]) -> None:
    """Fill `module`, which was built on the meta device, with its tensors of the checkpoint, in fp32.

    prefix: of the module's names in the checkpoint.
    """
    for name in names:
        part, _, parameter = name.removeprefix(prefix).rpartition(".")
        module.get_submodule(part)._parameters[parameter] = nn.Parameter(trained[name].float(), requires_grad=False)


def merged(layer: Any, weight: Tensor) -> Tensor:
    """Return the weight of an adapted module with its adapter merged, in fp32, so that it is rounded only once."""
    base = layer.get_base_layer()
    bias, base.bias = getattr(base, "bias", None), None
    base.weight = nn.Parameter(weight.float(), requires_grad=False)
    layer.merge(safe_merge=True)
    result = base.weight.detach()
    base.weight, base.bias = nn.Parameter(weight.to("meta"), requires_grad=False), bias
    layer.merged_adapters.clear()
    return result


def merged_parameter(layer: Any, weight: Tensor) -> Tensor:
    """Return `weight` of a module that is no linear layer (stacked experts, their router) with its adapter `layer` merged, in
    fp32."""
    base, name = layer.get_base_layer(), layer.parameter_name
    on_meta = base._parameters[name]
    base._parameters[name] = nn.Parameter(weight.float(), requires_grad=False)  # peft computes where and as it is
    result = base._parameters[name].detach() + layer.get_delta_weight("default").detach()
    base._parameters[name] = on_meta
    return result


def load_trained(module: nn.Module, checkpoint: Path) -> None:
    """Load the trained parameters and the buffers of `checkpoint` into `module`, which is built as in training. Every rank must
    call it."""
    trained = Weights(checkpoint)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                with gathered([parameter], modified_by_rank=0):
                    parameter.copy_(trained[name])
        for name, buffer in module.named_buffers():
            if name in trained:
                buffer.copy_(trained[name])


def replace_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Add `tensors` to a safetensors file; those with the same names are replaced."""
    from safetensors.torch import load_file, save_file

    save_file(load_file(file) | {name: tensor.contiguous() for name, tensor in tensors.items()}, file, {"format": "pt"})
