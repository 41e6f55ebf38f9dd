"""Where each tensor of an exported model comes from, and safetensors files that are written one shard at a time.

A tensor is read when its shard is written, so one shard of weights is in memory (older safetensors copies it once more).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from dstune.config.schema import ModelConfig

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Source:
    """A tensor that is not in memory yet."""

    shape: torch.Size
    dtype: torch.dtype
    """As it is stored; what `read` gives is converted."""
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
    """What a model saves: parameters (a tied one once, by its first name), persistent buffers."""
    parameters = {name: parameter.data for name, parameter in model.named_parameters()}
    every = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return parameters | {name: tensor for name, tensor in model.state_dict().items() if name not in every}


class BaseWeights(Mapping[str, Tensor]):
    """The pretrained weights of a model by the names of its parameters, straight from the safetensors files.

    Raises LookupError where a name or shape of `wanted` is not in the files as it is: transformers loads some
    architectures under other names, or joins tensors.
    """

    def __init__(self, config: ModelConfig, prefix: str, wanted: Mapping[str, torch.Size]):
        """prefix: of the body's parameters (`model`, `bert`), which a file may have or lack."""
        self._files: dict[str, Any] = {}
        folder = _folder(config)
        places = tensor_files(folder)
        self._found: dict[str, tuple[Path, str]] = {}
        for name, shape in wanted.items():
            key = next(
                (key for key in (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}") if key in places), ""
            )
            if not key or torch.Size(self._open(folder / places[key]).get_slice(key).get_shape()) != shape:
                raise LookupError(name)
            self._found[name] = folder / places[key], key

    def __getitem__(self, name: str) -> Tensor:
        file, key = self._found[name]
        return self._open(file).get_tensor(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def _open(self, file: Path) -> Any:
        if file.name not in self._files:
            self._files[file.name] = safe_open(file, framework="pt")
        return self._files[file.name]


def _folder(config: ModelConfig) -> Path:
    from huggingface_hub import snapshot_download

    from dstune.models.load import local_path

    path = local_path(config.path)
    if Path(path).is_dir():
        return Path(path)
    return Path(snapshot_download(path, revision=config.revision, local_files_only=True, allow_patterns=["*.json"]))


def tensor_files(folder: Path) -> dict[str, str]:
    """The file of each tensor. Raises LookupError where there is neither an index nor one file."""
    if (folder / INDEX).is_file():
        with suppress(ValueError):
            places: dict[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
            return places
    file = folder / "model.safetensors"
    if not file.is_file():
        raise LookupError(f"{folder} has no model.safetensors")
    with safe_open(file, framework="pt") as opened:
        return dict.fromkeys(opened.keys(), file.name)
