"""Adds finished adapters to the frozen weights below the adapter that is trained."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor, nn

from dstune.checkpoint.adapters import ADAPTED
from dstune.core.confinement.here import check_patterns
from dstune.core.errors import Problem, UserError
from dstune.methods._peft.files import read_settings, tensors_of
from dstune.methods.lora.start import shift


def put_beneath(model: nn.Module, folders: list[str]) -> None:
    """Add finished LoRA adapters to the frozen weights of `model`, as shifts. Every rank must call it.

    Raises UserError if one of them has anything other than low-rank matrices for the model's linear layers.
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
    """Yield (module, A [rank, in], B [out, rank] times the adapter's scale), in fp32."""
    from dstune.models.peft_import import peft

    settings = read_settings(folder, "method.frozen_adapters")
    tensors = tensors_of(folder, "method.frozen_adapters")
    modules = sorted({key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")})
    if settings.get("use_dora") or len(tensors) != 2 * len(modules):
        reason = (
            "holds more than low-rank matrices (DoRA, modules or tokens trained whole), which have no sum with another"
        )
        fix = f"dstune export RUN --merge, and model.path with what it writes, instead of {folder}"
        raise UserError(Problem("method.frozen_adapters", reason, fix, str(folder)))
    names = [module.removeprefix(ADAPTED) for module in modules]
    check_patterns(settings, names, "method.frozen_adapters", str(folder))
    for module in modules:
        name = module.removeprefix(ADAPTED)
        a, b = tensors[f"{module}.lora_A.weight"].float(), tensors[f"{module}.lora_B.weight"].float()
        patterns = settings.get("alpha_pattern") or {}
        alpha = patterns.get(peft.utils.other.get_pattern_key(list(patterns), name), settings["lora_alpha"])
        yield name, a, b * (alpha / (math.sqrt(len(a)) if settings.get("use_rslora") else len(a)))
