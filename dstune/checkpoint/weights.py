"""Lazy tensors of an exported model, and safetensors files that are written from them one shard at a time.

A tensor is read when its shard is written, so one shard of weights is in memory (older safetensors copies it once more).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dstune.core.weight_index import INDEX


@dataclass(frozen=True)
class Source:
    """A tensor that is not in memory yet."""

    shape: torch.Size
    dtype: torch.dtype
    """The stored type, to which the result of `read` is converted."""
    read: Callable[[], Tensor]


def write_safetensors(folder: Path, sources: Mapping[str, Source], max_shard_size: int | str) -> None:
    """Write `sources` to `folder` as `model.safetensors`, or as several files with an index.

    max_shard_size: bytes, or text such as "5GB". A tensor larger than that has a file of its own.
    """
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    planned = {name: torch.empty(source.shape, dtype=source.dtype, device="meta") for name, source in sources.items()}
    split = split_torch_state_dict_into_shards(
        planned, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    for file, names in split.filename_to_tensors.items():
        shard = {name: sources[name].read().to(sources[name].dtype).contiguous() for name in names}
        save_file(shard, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)  # safetensors makes it readable by its owner only
        del shard
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def saved_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return what a model saves: parameters (a tied one once, by its first name), persistent buffers."""
    parameters = {name: parameter.data for name, parameter in model.named_parameters()}
    every = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return parameters | {name: tensor for name, tensor in model.state_dict().items() if name not in every}


def tied_names(model: nn.Module) -> dict[str, str]:
    """Return the further names of tied parameters, each with the first, under which it is saved."""
    first: dict[int, str] = {}
    names = (
        (name, first.setdefault(id(tensor), name)) for name, tensor in model.named_parameters(remove_duplicate=False)
    )
    return {name: owner for name, owner in names if name != owner}
