"""Adapters that were saved before: read as a start of the new one, or put beneath it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dstune.config.adapter_file import read_settings
from dstune.errors import Problem, UserError
from dstune.models.lora_start import shift
from dstune.zero.parts import gathered

PREFIX = "base_model.model."
"""What peft puts in front of the names of a model that it adapts."""


def load_adapter(adapted: Any, folder: Path) -> None:
    """Give the adapter `default` of a PeftModel the weights in `folder`. Every rank must call it.

    Raises UserError where the two do not have the same tensors.
    """
    import peft

    tensors = _tensors(folder, "method.adapter")
    own = {name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    # What is trained as a whole may be partitioned by now.
    with gathered(list(own.values()), modified_by_rank=0):
        expected = set(peft.get_peft_model_state_dict(adapted, save_embedding_layers=False))
        if missing := sorted(expected ^ set(tensors)):
            reason = f"does not fit the model: {missing[0]} is only in {'it' if missing[0] in tensors else 'the model'}"
            fix = "model.path and model.chat_template as the adapter was trained, and its own target_modules"
            raise UserError(Problem("method.adapter", reason, fix, str(folder)))
        try:
            peft.set_peft_model_state_dict(adapted, tensors)
        except RuntimeError as error:
            reason = f"does not fit the model: {' '.join(str(error).split())[:200]}"
            raise UserError(Problem("method.adapter", reason, "model.path as it was trained", str(folder))) from error


def put_beneath(model: nn.Module, folders: list[str]) -> None:
    """Add finished LoRA adapters to the frozen weights of `model`, as shifts. Every rank must call it.

    Raises UserError where one of them has other parts than low-rank matrices of the model's linear layers.
    """
    for folder in map(Path, folders):
        for name, a, b in _products(folder):
            try:
                base = model.get_submodule(name)
            except AttributeError:
                base = None
            shape = None if not isinstance(base, nn.Linear) else (base.out_features, base.in_features)
            if shape != (b.shape[0], a.shape[1]):
                reason = f"does not fit the model: {name} is no linear layer of {b.shape[0]}x{a.shape[1]}"
                raise UserError(Problem("method.frozen_adapters", reason, "adapters of this model", str(folder)))
            assert isinstance(base, nn.Linear)
            shift(base, a, b)


def _products(folder: Path) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(module, A [rank, in], B [out, rank] with the scale in it), in fp32."""
    from peft.utils.other import get_pattern_key

    settings = read_settings(folder, "method.frozen_adapters")
    tensors = _tensors(folder, "method.frozen_adapters")
    modules = sorted({key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")})
    if settings.get("use_dora") or len(tensors) != 2 * len(modules):
        reason = (
            "holds more than low-rank matrices (DoRA, modules or tokens trained whole), which have no sum with another"
        )
        fix = f"dstune export RUN --merge, and model.path with what it writes, instead of {folder}"
        raise UserError(Problem("method.frozen_adapters", reason, fix, str(folder)))
    for module in modules:
        name = module.removeprefix(PREFIX)
        a, b = tensors[f"{module}.lora_A.weight"].float(), tensors[f"{module}.lora_B.weight"].float()
        patterns = settings.get("alpha_pattern") or {}
        alpha = patterns.get(get_pattern_key(list(patterns), name), settings["lora_alpha"])
        yield name, a, b * (alpha / (math.sqrt(len(a)) if settings.get("use_rslora") else len(a)))


def _tensors(folder: Path, key: str) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(folder / "adapter_model.safetensors")
    except (OSError, SafetensorError) as error:
        reason = f"has no adapter_model.safetensors that can be read: {error}"
        raise UserError(Problem(key, reason, "give the folder of an adapter", str(folder))) from error
