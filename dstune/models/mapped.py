"""Maps files of weights into memory, from which each rank takes its part."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightConverter

from dstune.config.schema import ModelConfig
from dstune.models.base_weights import metadata_folder, tensor_files

PROBES = 32
"""Pieces of 4 KiB that are read of a file of weights, to distinguish it from a file with the same names and shapes."""


@dataclass(frozen=True)
class Mapped:
    """Weights that can be used directly in their files, mapped into memory."""

    contents: str
    """Digest of the name, size, header and PROBES pieces of each file. Other weights change it; a single changed byte may not."""
    dtype: torch.dtype
    """Type of all floating-point weights."""

    @classmethod
    def of(cls, config: ModelConfig, architecture: PretrainedConfig) -> Mapped | None:
        """Plan to map the files. None if they hold several types or quantized weights, if transformers joins tensors while it loads
        them (those of experts), or for a model with its own code, since only that may know how to make its buffers."""
        joined = any(
            isinstance(change, WeightConverter)
            for part in parts_of(architecture)
            for change in get_checkpoint_conversion_mapping(part.model_type) or ()
        )
        own_code = config.trust_remote_code and getattr(architecture, "auto_map", None)
        if joined or own_code or getattr(architecture, "quantization_config", None):
            return None
        digest = xxhash.xxh3_64()
        stored: set[str] = set()
        try:
            folder = metadata_folder(config)
            for name in sorted(set(tensor_files(folder).values())):
                stored |= _add_file(digest, folder / name)
        except (LookupError, OSError, ValueError, SafetensorError):
            return None  # `load_model` says what is wrong with them
        dtype = STORED.get(stored.pop()) if len(stored) == 1 else None
        return None if dtype is None else cls(digest.hexdigest(), dtype)


def parts_of(architecture: PretrainedConfig) -> Iterator[PretrainedConfig]:
    """Yield a configuration, and those of the models in it."""
    yield architecture
    for name in architecture.sub_configs:
        part = getattr(architecture, name, None)
        if isinstance(part, PretrainedConfig):
            yield from parts_of(part)


def _add_file(digest: Any, path: Path) -> set[str]:
    """Add a safetensors file to the digest. Returns the names of its floating-point types."""
    with safe_open(path, framework="pt") as tensors:  # first: this refuses any other kind of file
        types = {tensors.get_slice(key).get_dtype() for key in tensors.keys()}  # noqa: SIM118
    size = path.stat().st_size
    with path.open("rb") as file:
        digest.update(f"{path.name} {size} ".encode() + file.read(int.from_bytes(file.read(8), "little")))
        for probe in range(PROBES):
            file.seek(size * probe // PROBES)
            digest.update(file.read(4096))
    return {kind for kind in types if "F" in kind}


STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Types by their names in safetensors."""


def take_buffers(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give a model that was built in another type the buffers of a model built in `dtype`, and set that type in its configuration:
    Gemma, for example, rounds its scale of embeddings to it."""

    def without_weights(module: nn.Module, name: str, parameter: nn.Parameter) -> Any:
        return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    hook = register_module_parameter_registration_hook(without_weights)
    try:
        made = type(model)._from_config(model.config, dtype=dtype)
    finally:
        hook.remove()
    saved_names, initial_buffers = set(made.state_dict()), dict(made.named_buffers())
    in_full = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    for name, buffer in model.named_buffers():
        if name not in saved_names:
            buffer.data = initial_buffers[name]
        elif not any(part in name for part in in_full):
            buffer.data = buffer.to(initial_buffers[name].dtype)
