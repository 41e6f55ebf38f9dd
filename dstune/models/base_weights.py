"""The pretrained weights of a model as they are in its files, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from dstune import samples
from dstune.config.schema import ModelConfig
from dstune.core.errors import Problem, UserError
from dstune.core.parsing import object_in

INDEX = "model.safetensors.index.json"


def original_weights(config: ModelConfig, prefix: str, expected: Mapping[str, torch.Size]) -> Mapping[str, Tensor]:
    """`BaseWeights`. Raises UserError where the files have other names than the model's parameters."""
    try:
        return BaseWeights(config, prefix, expected)
    except LookupError as error:
        reason = f"compares weights with those in the model's files, which have none of the name and shape of {error}"
        raise UserError(Problem("method.init", reason, "method.init=default", "loftq")) from error


class BaseWeights(Mapping[str, Tensor]):
    """The pretrained weights of a model by the names of its parameters, straight from the safetensors files.

    Raises LookupError where a name or shape of `wanted` is not in the files as it is: transformers loads some
    architectures under other names, or joins tensors.
    """

    def __init__(self, config: ModelConfig, prefix: str, expected: Mapping[str, torch.Size]):
        """prefix: of the body's parameters (`model`, `bert`), which a file may have or lack."""
        self._files: dict[str, Any] = {}
        folder = metadata_folder(config)
        places = tensor_files(folder)
        self._found: dict[str, tuple[Path, str]] = {}
        for name, shape in expected.items():
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


def metadata_folder(config: ModelConfig) -> Path:
    from huggingface_hub import snapshot_download

    path = str(samples.resolve(config.path, fetch=False)) if samples.is_sample(config.path) else config.path
    if Path(path).is_dir():
        return Path(path)
    return Path(snapshot_download(path, revision=config.revision, local_files_only=True, allow_patterns=["*.json"]))


def tensor_files(folder: Path) -> dict[str, str]:
    """The file of each tensor; of several files the one that transformers would take. Raises LookupError where there is none."""
    file = folder / "model.safetensors"
    if file.is_file():
        with safe_open(file, framework="pt") as opened:
            return dict.fromkeys(opened.keys(), file.name)
    places = object_in(folder / INDEX).get("weight_map")
    if isinstance(places, dict):
        return places
    raise LookupError(f"{folder} has no model.safetensors")
