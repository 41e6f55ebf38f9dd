"""Exports runs that trained only the language model of a larger model, with the class of the language model alone.

Runs of earlier versions did so on Qwen 3.5. Servers load the class of the base model's files and ignore tensors with other
names, so such an export has the names, the configuration and all other tensors of that class.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dstune.checkpoint.adapters import ADAPTED
from dstune.checkpoint.weights import Source, saved_tensors
from dstune.config.schema import ModelConfig
from dstune.models.base_weights import BaseFiles, BaseWeights, Loading
from dstune.models.load import load_config
from dstune.models.unreached import text_config_of, whole_class


@dataclass(frozen=True)
class Surroundings:
    """The model that a trained language model is a part of."""

    model: Any
    """The larger model, of the class of the base model's files, on the meta device."""
    body: str
    """Name of the body in the class that was trained."""
    place: str
    """Name of the same body in `model`."""

    @classmethod
    def of(cls, config: ModelConfig, trained: Any) -> Surroundings | None:
        """Build the larger model; None if `trained` has the class of the base model's files, or a class with another head."""
        from transformers import AutoModelForCausalLM

        architecture = load_config(config)
        text: Any = text_config_of(architecture)
        whole = whole_class(AutoModelForCausalLM, architecture)
        if type(trained.config) is not type(text) or whole is AutoModelForCausalLM or not trained.can_generate():
            return None
        with torch.device("meta"):
            model = whole.from_config(architecture)
        text = model.config.get_text_config()
        text.vocab_size = trained.config.vocab_size
        bodies = [name for name, module in model.named_modules() if type(module) is type(trained.base_model)]
        return cls(model, trained.base_model_prefix, bodies[0]) if bodies else None

    def name(self, name: str) -> str:
        """Return the name in `model` of what is `name` in the class that was trained."""
        inside = f"{self.body}."
        return f"{self.place}.{name.removeprefix(inside)}" if name.startswith(inside) else name

    def sources(self, config: ModelConfig, trained: Mapping[str, Source]) -> dict[str, Source]:
        """Return all tensors of `model`: those of the language model, `trained`, under their names in it, and the base's others."""
        source_by_name = {self.name(name): source for name, source in trained.items()}
        others = {
            name: tensor.shape for name, tensor in saved_tensors(self.model).items() if name not in source_by_name
        }
        keys = Loading.of(self.model, self.model.state_dict(), BaseFiles(config)).keys
        base = BaseWeights(config, self.model.base_model_prefix, others, keys, partial=True)
        for name in base:
            source_by_name[name] = Source(others[name], base.dtype(name), partial(base.__getitem__, name))
        return source_by_name

    def rename_settings(self, settings: Any, adapted: Any) -> None:
        """Rename the modules in an adapter's settings to their names in `model`. adapted: the PeftModel."""
        if names := getattr(adapted, "targeted_module_names", None):
            settings.target_modules = sorted(map(self.name, names))
        for key in ("rank_pattern", "alpha_pattern"):
            if patterns := getattr(settings, key, None):
                setattr(settings, key, {self.name(name): value for name, value in patterns.items()})

    def rename_adapter(self, file: Path) -> None:
        """Rename the tensors in an adapter's file to their names in `model`."""
        from safetensors.torch import load_file, save_file

        tensors = {
            ADAPTED + self.name(key.removeprefix(ADAPTED)) if key.startswith(ADAPTED) else key: tensor
            for key, tensor in load_file(file).items()
        }
        save_file(tensors, file, {"format": "pt"})
