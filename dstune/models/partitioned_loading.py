"""What transformers (5.24) gets wrong when it loads a checkpoint into a model whose weights ZeRO-3 has partitioned already."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from transformers import MODEL_MAPPING, PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import Split

from dstune.models.base_weights import name_in_model
from dstune.models.mapped import parts_of
from dstune.zero.parts import full_shape


@contextmanager
def corrected_partitioned_loading() -> Iterator[None]:
    """Within the block, let transformers load into partitioned weights what it loads into whole ones.

    Names that the model has keep their tensors (`name_in_model`). Joined tensors are split by the whole shapes of their parts: a
    partitioned parameter reports the shape [0], and Sarvam MoE stores queries, keys and values as one tensor. Modules whose
    tensors are all loaded are not initialized: Nemotron's diarization would index its loaded weights, of shape [0], for that.
    """
    convert, initialize = Split.convert, PreTrainedModel._initialize_weights

    def split(operation: Split, *arguments: Any, model: PreTrainedModel, **options: Any) -> dict[str, torch.Tensor]:
        return convert(operation, *arguments, model=_WholeShapes(model), **options)

    def initialize_missing(model: PreTrainedModel, module: nn.Module, *arguments: Any) -> None:
        tensors = [*module.parameters(), *module.buffers()]
        if not tensors or not all(getattr(tensor, "_is_hf_initialized", False) for tensor in tensors):
            initialize(model, module, *arguments)

    with (
        patch("transformers.core_model_loading.rename_source_key", name_in_model),
        patch.object(Split, "convert", split),
        patch.object(PreTrainedModel, "_initialize_weights", initialize_missing),
    ):
        yield


def import_parts(architecture: PretrainedConfig) -> None:
    """Import the code of each model in a configuration, before DeepSpeed's `zero.Init` begins.

    `zero.Init` wraps the constructor of a class that is defined within it, and at its end puts back the one without decorators.
    The experts of Nemotron H, for example, would have no configuration in the next model of a process.
    """
    for part in parts_of(architecture):
        if type(part) in MODEL_MAPPING:
            MODEL_MAPPING[type(part)]


class _WholeShapes:
    """The parameters of a model, with the shapes that they had before they were partitioned."""

    def __init__(self, model: PreTrainedModel):
        self._model = model

    def get_parameter(self, name: str) -> torch.Tensor:
        parameter = self._model.get_parameter(name)
        return torch.empty(full_shape(parameter), dtype=parameter.dtype, device="meta")
