"""Reads the pretrained weights of a model from its files, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from dstune import samples
from dstune.config.registered import fetched_path
from dstune.config.schema import ModelConfig
from dstune.core.errors import Problem, UserError
from dstune.core.parsing import object_in
from dstune.core.weight_index import INDEX, check_indexes


def original_weights(config: ModelConfig, prefix: str, shapes: Mapping[str, torch.Size]) -> Mapping[str, Tensor]:
    """Return `BaseWeights`. Raises UserError if the files lack the names or shapes of the model's parameters."""
    try:
        return BaseWeights(config, prefix, shapes)
    except LookupError as error:
        reason = f"compares weights with those in the model's files, which have none of the name and shape of {error}"
        raise UserError(Problem("method.init", reason, "method.init=default", "loftq")) from error


class BaseFiles(Mapping[str, Tensor]):
    """The tensors of a model's safetensors files; each is read on access. Raises LookupError if there are no such files."""

    def __init__(self, config: ModelConfig):
        self._folder = metadata_folder(config)
        self._places = tensor_files(self._folder)
        self._opened: dict[str, Any] = {}

    def __getitem__(self, key: str) -> Tensor:
        tensor: Tensor = self._file(key).get_tensor(key)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: object) -> bool:
        return key in self._places

    def shape(self, key: str) -> torch.Size:
        return torch.Size(self._file(key).get_slice(key).get_shape())

    def dtype(self, key: str) -> torch.dtype:
        # An empty slice has the type and no content.
        part = self._file(key).get_slice(key)
        dtype: torch.dtype = (part[:0] if part.get_shape() else part[...]).dtype
        return dtype

    def _file(self, key: str) -> Any:
        name = self._places[key]
        if name not in self._opened:
            self._opened[name] = safe_open(self._folder / name, framework="pt")
        return self._opened[name]


class BaseWeights(Mapping[str, Tensor]):
    """The pretrained weights of a model by the names of its parameters, read from the safetensors files without transformers.

    Raises LookupError if the files do not have a name and shape of `shapes`: transformers joins some tensors on loading.
    """

    def __init__(
        self,
        config: ModelConfig,
        prefix: str,
        shapes: Mapping[str, torch.Size],
        keys: Mapping[str, str] | None = None,
        *,
        partial: bool = False,
    ):
        """prefix: of the body's parameters (`model`, `bert`), which names in the files may lack. keys: names in the files of
        tensors that are called otherwise there (`Loading.keys`). partial: leave out tensors that are not in the files."""
        self._files = BaseFiles(config)
        self._keys: dict[str, str] = {}
        for name, shape in shapes.items():
            candidates = (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}", (keys or {}).get(name))
            key = next((key for key in candidates if key in self._files), None)
            if key is not None and self._files.shape(key) == shape:
                self._keys[name] = key
            elif not partial:
                raise LookupError(name)

    def __getitem__(self, name: str) -> Tensor:
        return self._files[self._keys[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def dtype(self, name: str) -> torch.dtype:
        return self._files.dtype(self._keys[name])


def name_in_model(
    key: str,
    renamings: list[WeightRenaming],
    converters: list[WeightConverter],
    base_model_prefix: str | None = None,
    meta_state_dict: dict[str, Any] | None = None,
) -> tuple[str, str | None]:
    """Return the name in the model of the tensor `key` of its files, and the pattern of the converter that joins it to others.

    A name that the model has stays as it is, whatever the renamings match: the `model.norm.weight` that transformers saves of
    DeepSeek V4. Has the signature of `rename_source_key`, which lacks this; transformers 5.24 adds it, except at ZeRO-3.
    """
    name, pattern = rename_source_key(key, renamings, converters, base_model_prefix, meta_state_dict)
    state = meta_state_dict or {}
    if name not in state and key in state:
        return rename_source_key(key, [], [], base_model_prefix, meta_state_dict)
    return name, pattern


@dataclass(frozen=True)
class Loading:
    """How transformers loads the tensors of a model's files."""

    keys: Mapping[str, str]
    """For tensors that are loaded unchanged: the name in the files, by the name in the model."""
    dropped: tuple[str, ...]
    """Names in the files that the model has no tensor for: heads for several tokens (`mtp.*`), towers that a language model
    lacks."""

    @classmethod
    def of(cls, model: PreTrainedModel, state: Mapping[str, Tensor], keys: Iterable[str]) -> Loading:
        """Plan the loading that `from_pretrained` does of files with `keys` into `model`, which may be on the meta device.

        state: its `state_dict` without adapters.
        """
        changes = get_model_conversion_mapping(model)
        renamings = [change for change in changes if isinstance(change, WeightRenaming)]
        converters = [change for change in changes if isinstance(change, WeightConverter)]
        key_by_name, dropped = {}, []
        for key in keys:
            name, joined = name_in_model(key, renamings, converters, model.base_model_prefix, dict(state))
            if name not in state:
                dropped.append(key)
            elif joined is None:
                key_by_name[name] = key
        return cls(key_by_name, tuple(sorted(dropped)))


def metadata_folder(config: ModelConfig) -> Path:
    from huggingface_hub import snapshot_download

    path = (
        str(samples.resolve(config.path, fetch=False)) if samples.is_sample(config.path) else fetched_path(config.path)
    )
    if Path(path).is_dir():
        return Path(path)
    return Path(snapshot_download(path, revision=config.revision, local_files_only=True, allow_patterns=["*.json"]))


def tensor_files(folder: Path) -> dict[str, str]:
    """Return the file of each tensor, as transformers would choose it.

    Raises:
        LookupError: there are no safetensors files. UserError: the index names files outside of the folder.
    """
    file = folder / "model.safetensors"
    if file.is_file():
        with safe_open(file, framework="pt") as opened:
            return dict.fromkeys(opened.keys(), file.name)
    check_indexes(folder, "model.path", str(folder))
    places = object_in(folder / INDEX).get("weight_map")
    if isinstance(places, dict):
        return places
    raise LookupError(f"{folder} has no model.safetensors")
