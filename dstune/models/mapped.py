"""Weights used right in their files, mapped into memory, from which each rank takes its part."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightConverter

from dstune.config.schema import ModelConfig
from dstune.models.base_weights import metadata_folder, tensor_files

PROBES = 32
"""Pieces of 4 KiB of a file of weights that are looked at to tell it from another file of the same names and shapes."""


@dataclass(frozen=True)
class Mapped:
    """Weights that can be used right in their files, mapped into memory."""

    contents: str
    """Digest of names, sizes, headers and PROBES pieces of each file: other weights differ in them, one changed byte may not."""
    dtype: torch.dtype
    """Of all their floating-point numbers."""

    @classmethod
    def of(cls, config: ModelConfig, architecture: PretrainedConfig) -> Mapped | None:
        """None where the files hold several types, or transformers joins tensors while it loads them, as those of experts."""
        changes = get_checkpoint_conversion_mapping(architecture.get_text_config().model_type) or ()
        if any(isinstance(change, WeightConverter) for change in changes):
            return None
        digest = xxhash.xxh3_64()
        stored: set[str] = set()
        try:
            folder = metadata_folder(config)
            for name in sorted(set(tensor_files(folder).values())):
                stored |= _add_file(digest, folder / name)
        except (LookupError, OSError, ValueError):
            return None  # `load_model` says what is wrong with them
        dtype = STORED.get(stored.pop()) if len(stored) == 1 else None
        return None if dtype is None else cls(digest.hexdigest(), dtype)


def _add_file(digest: Any, path: Path) -> set[str]:
    """Add a safetensors file to the digest. Returns what it calls the types of its floating-point numbers."""
    size = path.stat().st_size
    with path.open("rb") as file:
        header = file.read(int.from_bytes(file.read(8), "little"))
        digest.update(f"{path.name} {size} ".encode() + header)
        for probe in range(PROBES):
            file.seek(size * probe // PROBES)
            digest.update(file.read(4096))
    types = {entry["dtype"] for key, entry in json.loads(header).items() if key != "__metadata__"}
    return {kind for kind in types if "F" in kind}


STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""The types that safetensors calls so."""


def take_buffers(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give a model that was made in another type the buffers of one made in `dtype`: Gemma's scale of embeddings is rounded."""

    def without_weights(module: nn.Module, name: str, parameter: nn.Parameter) -> Any:
        return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    hook = register_module_parameter_registration_hook(without_weights)
    try:
        made = type(model)._from_config(model.config, dtype=dtype)
    finally:
        hook.remove()
    kept = set(made.state_dict())
    for (name, buffer), (_, wanted) in zip(model.named_buffers(), made.named_buffers(), strict=True):
        buffer.data = buffer.to(wanted.dtype) if name in kept else wanted
