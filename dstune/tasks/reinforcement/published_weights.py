"""The weights that train, written where a server reads them, under a name that says which they are."""

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
"""Of the names of versions, which go on with a digest of the weights."""


class PublishedWeights:
    """Writes the adapter, or the whole model where there is none, into a folder of `folder` that is named by its content: the same
    weights have the same name in every launch, and no other weights have it."""

    def __init__(self, engine: Engine, world: World, folder: Path):
        """Raises UserError for an adapter that a server does not load as it is; on all ranks alike."""
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
        """Write what the weights are now; returns the name of this version, on every rank. Every rank calls this."""
        tensors = self._adapter() if self.is_adapter else self._whole_model()
        version = ""
        if self._world.is_main:
            version = f"{PREFIX}{digest(tensors)[:24]}"
            if not self.path_of(version).is_dir():
                self._write(tensors, self.path_of(version))
        return str(self._world.broadcast(version))

    def remove(self, version: str) -> None:
        """Remove what was written of a version."""
        if self._world.is_main:
            shutil.rmtree(self.path_of(version), ignore_errors=True)

    def remove_earlier(self, version: str) -> None:
        """Remove what earlier launches left beside this version, which can be a whole model for each."""
        if self._world.is_main:
            for folder in self._folder.glob(f"{PREFIX}*"):
                if folder.name != version:
                    shutil.rmtree(folder, ignore_errors=True)

    def _adapter(self) -> dict[str, Tensor]:
        """Return the adapter on the main rank, nothing elsewhere."""
        from peft import get_peft_model_state_dict

        module = self._engine.module
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        with gathered(trained):
            if not self._world.is_main:
                return {}
            return {name: on_host(tensor) for name, tensor in get_peft_model_state_dict(module).items()}

    def _whole_model(self) -> dict[str, Tensor]:
        """Return all weights likewise: one parameter at a time, so that no device has more of them than it holds anyway."""
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
    """Say why vLLM would not load the adapter as what it is; empty where it does."""
    if len(module.peft_config) > 1:
        return "the model has several adapters, and a server takes one"
    config = next(iter(module.peft_config.values()))
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind != "LORA":
        return f"vLLM loads adapters of the kind LORA alone, and this one is {kind}"
    parts = {
        "use_dora": "it trains magnitudes (DoRA)",
        "rank_pattern": "its ranks differ by module, which vLLM does not read",
        "alpha_pattern": "its factors differ by module, which vLLM does not read",
        "modules_to_save": "it trains whole modules beside the adapter",
        "trainable_token_indices": "it trains rows of new tokens",
        "target_parameters": "it adapts parameters that are no linear layers",
    }
    for name, reason in parts.items():
        if getattr(config, name, None):
            return reason
    if getattr(config, "init_lora_weights", True) not in (True, "gaussian"):
        return "it began with a part of the base's weights, which the server has whole"
    if getattr(module.get_base_model(), "is_quantized", False):
        return "the base is quantized here, and another model in the server"
    return ""
