"""Writes the weights in training to a folder that a server reads, under a name that identifies them."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dstune.core.distributed import World
from dstune.core.errors import Problem, UserError
from dstune.core.files import INCOMPLETE
from dstune.zero.engine import Engine
from dstune.zero.parts import gathered

PREFIX = "dstune-"
"""Prefix of the names of versions; a digest of the weights follows."""


class PublishedWeights:
    """Writes the adapter, or without one the complete model, to a subfolder of `folder` that is named by a digest of the weights.
    So the same weights have the same name in every launch, and no other weights have it."""

    def __init__(self, engine: Engine, world: World, folder: Path):
        """Raise UserError, on all ranks alike, if a server could not load the adapter exactly."""
        self._engine, self._world, self._folder = engine, world, folder
        module: Any = engine.module
        self.is_adapter = hasattr(module, "peft_config")
        if self.is_adapter and (reason := unservable(module)):
            raise UserError(
                Problem("task.rollout", reason, "plain method=lora or method=full, or task.rollout=fast", "vllm")
            )

    def path_of(self, version: str) -> Path:
        return self._folder / version

    def write(self) -> str:
        """Write the current weights; return the name of this version on every rank. Every rank must call it."""
        tensors = self._adapter() if self.is_adapter else self._whole_model()
        version = ""
        if self._world.is_main:
            version = f"{PREFIX}{digest(tensors)[:24]}"
            if not self.path_of(version).is_dir():
                self._write(tensors, self.path_of(version))
        return str(self._world.broadcast(version))

    def remove(self, version: str) -> None:
        """Remove the files of a version."""
        if self._world.is_main:
            shutil.rmtree(self.path_of(version), ignore_errors=True)

    def remove_earlier(self, version: str) -> None:
        """Remove the versions that earlier launches left behind, each of which may be a complete model."""
        if self._world.is_main:
            for folder in self._folder.glob(f"{PREFIX}*"):
                if folder.name != version:
                    shutil.rmtree(folder, ignore_errors=True)

    def _adapter(self) -> dict[str, Tensor]:
        """Return the adapter's tensors on the main rank; an empty dictionary on the others."""
        from peft import get_peft_model_state_dict

        module = self._engine.module
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        with gathered(trained):
            if not self._world.is_main:
                return {}
            return {name: on_host(tensor) for name, tensor in get_peft_model_state_dict(module).items()}

    def _whole_model(self) -> dict[str, Tensor]:
        """Return all weights on the main rank; an empty dictionary on the others. Gathers one parameter at a time, so that devices
        need room for only one complete parameter."""
        module, tensors = self._engine.module, dict[str, Tensor]()
        for name, parameter in module.named_parameters():
            with gathered([parameter]):
                if self._world.is_main:
                    tensors[name] = on_host(parameter)
        if self._world.is_main:
            parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
            buffers = {name: tensor for name, tensor in module.state_dict().items() if name not in parameters}
            tensors |= {name: on_host(tensor) for name, tensor in buffers.items()}
        return tensors

    def _write(self, tensors: Mapping[str, Tensor], folder: Path) -> None:
        from safetensors.torch import save_file

        incomplete = folder.with_name(f"{folder.name}{INCOMPLETE}")
        shutil.rmtree(incomplete, ignore_errors=True)
        incomplete.mkdir(parents=True)
        module: Any = self._engine.module
        if self.is_adapter:
            save_file(dict(tensors), incomplete / "adapter_model.safetensors", {"format": "pt"})
            next(iter(module.peft_config.values())).save_pretrained(incomplete)
        else:
            module.save_pretrained(incomplete, state_dict=dict(tensors))
        for path in incomplete.iterdir():
            path.chmod(0o644)  # the server may run as somebody else
        incomplete.rename(folder)


def on_host(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Compute the SHA-256 of names, formats, shapes and bits."""
    whole = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        whole.update(f"{name}/{tensor.dtype}/{tuple(tensor.shape)}/".encode())
        whole.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return whole.hexdigest()


def unservable(module: Any) -> str:
    """Return why vLLM would not load the adapter exactly; empty if it would."""
    if len(module.peft_config) > 1:
        return "the model has several adapters, and a server takes one"
    config = next(iter(module.peft_config.values()))
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind != "LORA":
        return f"vLLM loads only adapters of the type LORA, and this one is {kind}"
    parts = {
        "use_dora": "it trains magnitudes (DoRA)",
        "rank_pattern": "its ranks differ by module, which vLLM does not read",
        "alpha_pattern": "its factors differ by module, which vLLM does not read",
        "modules_to_save": "it trains whole modules besides the adapter",
        "trainable_token_indices": "it trains rows of new tokens",
        "target_parameters": "it adapts parameters that are not linear layers",
    }
    for name, reason in parts.items():
        if getattr(config, name, None):
            return reason
    if getattr(config, "init_lora_weights", True) not in (True, "gaussian"):
        return "its start took a part out of the base's weights, which the server's base still contains"
    if getattr(module.get_base_model(), "is_quantized", False):
        return "the base is quantized in training, so the server's base is not the same model"
    return ""
