"""Exports low-rank adapters whose base weights were split, or that were trained on top of finished adapters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dstune.checkpoint.adapters import ADAPTED
from dstune.methods.lora.start import SHIFT_A, SHIFT_B, lora_layers


def shifts_by_module(trained: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the factors of the shift of each frozen weight (`start.shift`) by module, A [rank, in] and B [out, rank], in fp32."""
    shifts = {}
    for name in trained:
        owner, _, leaf = name.rpartition(".")
        if leaf == SHIFT_A:
            module = owner.removeprefix(ADAPTED).removesuffix(".base_layer")
            shifts[module] = trained[name].float(), trained[f"{owner}.{SHIFT_B}"].float()
    return shifts


def shifted(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """Return `weight` [out, in] plus the shift `b @ a`, in fp32."""
    return weight.float() + b @ a


def plain_lora(adapted: Any, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of one plain adapter, by their names in its file, if weights were split or build on finished adapters;
    else an empty dictionary.

    adapted: the PeftModel, whose settings get the new ranks and modules. The sum of two products of low rank is one:
    s B A + D C = [s B, D] [A; C].
    """
    shifts = shifts_by_module(trained)
    if not shifts:
        return {}
    layers = {name.removeprefix(ADAPTED): layer for name, layer in lora_layers(adapted)}
    tensors, ranks = {}, {}
    for module in sorted({*layers, *shifts}):
        prefix, lora_a, lora_b = f"{ADAPTED}{module}", [], []
        if module in layers:
            lora_a.append(trained[f"{prefix}.lora_A.default.weight"].float())
            lora_b.append(trained[f"{prefix}.lora_B.default.weight"].float() * layers[module].scaling["default"])
        if module in shifts:
            lora_a.append(shifts[module][0])
            lora_b.append(shifts[module][1])
        tensors[f"{prefix}.lora_A.weight"] = torch.cat(lora_a)
        tensors[f"{prefix}.lora_B.weight"] = torch.cat(lora_b, dim=1)
        ranks[module] = sum(map(len, lora_a))
    settings = adapted.peft_config["default"]
    settings.r = settings.lora_alpha = Counter(ranks.values()).most_common(1)[0][0]  # the scale is 1, whatever the rank
    settings.use_rslora = False
    settings.rank_pattern = {module: rank for module, rank in ranks.items() if rank != settings.r}
    settings.alpha_pattern = dict(settings.rank_pattern)
    settings.target_modules = sorted(ranks)
    settings.init_lora_weights = True
    return tensors
