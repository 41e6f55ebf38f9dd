"""The tensors of adapters in a checkpoint: which module they belong to, and one plain adapter for what was split or added."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dstune.checkpoint.shards import Weights
from dstune.models.lora_start import SHIFT_A, SHIFT_B, lora_layers
from dstune.zero.parts import gathered

ADAPTED = "base_model.model."
"""What peft puts in front of the names of the model that it wraps."""

TUNER = "base_model."
"""In front of what all adapters share."""


MARKS = (".lora_", ".ia3_l.", ".vera_lambda_", ".oft_R.")
"""What follows the name of the adapted module in the names of its adapter's tensors."""


def adapters_by_module(names: Iterable[str]) -> dict[str, list[str]]:
    """Names of the tensors of each adapter, by the module that it is on."""
    found: dict[str, list[str]] = {}
    for name in names:
        for mark in MARKS:
            owner, separator, _ = name.partition(mark)
            if separator:
                found.setdefault(owner.removeprefix(ADAPTED), []).append(name)
    return found


def fill(module: nn.Module, prefix: str, names: Iterable[str], trained: Mapping[str, Tensor]) -> None:
    """Give `module`, which was built without memory, its tensors of the checkpoint in fp32.

    prefix: what the checkpoint has in front of the module's own names.
    """
    for name in names:
        part, _, parameter = name.removeprefix(prefix).rpartition(".")
        module.get_submodule(part)._parameters[parameter] = nn.Parameter(trained[name].float(), requires_grad=False)
    inner: Any
    for inner in module.modules():
        for buffer, shared in (("vera_A", f"{TUNER}vera_A.default"), ("vera_B", f"{TUNER}vera_B.default")):
            if shared in trained and hasattr(inner, buffer):
                getattr(inner, buffer)["default"] = trained[shared].float()
        if hasattr(inner, "rows") and hasattr(inner, "cols") and inner.rows.device.type == "meta":  # of OFT, not saved
            size = inner.block_size
            inner.rows, inner.cols = torch.triu_indices(size, size, 1)


def merged(layer: Any, leaf: str, weight: Tensor) -> Tensor:
    """The `weight` or `bias` of an adapted module with its adapter in it: computed in fp32, to be rounded once."""
    base = layer.get_base_layer()
    if leaf == "bias":
        scales = hasattr(layer, "ia3_l") and not layer.is_feedforward  # no other adapter touches the bias
        return weight.float() * layer.ia3_l["default"].flatten() if scales else weight
    bias, base.bias = getattr(base, "bias", None), None
    base.weight = nn.Parameter(weight.float(), requires_grad=False)
    layer.merge(safe_merge=True)
    result = base.weight.detach()
    base.weight, base.bias = nn.Parameter(weight.to("meta"), requires_grad=False), bias
    layer.merged_adapters.clear()
    return result


def merged_parameter(layer: Any, weight: Tensor) -> Tensor:
    """`weight` of a module that is no linear layer (stacked experts, their router) with the adapter `layer` in it, in fp32."""
    base, name = layer.get_base_layer(), layer.parameter_name
    on_meta = base._parameters[name]
    base._parameters[name] = nn.Parameter(weight.float(), requires_grad=False)  # peft computes where and as it is
    result = base._parameters[name].detach() + layer.get_delta_weight("default").detach()
    base._parameters[name] = on_meta
    return result


def load_trained(module: nn.Module, checkpoint: Path) -> None:
    """Put the trained parameters and the buffers of `checkpoint` into `module`, built as in training. Every rank must
    call it."""
    trained = Weights(checkpoint)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                with gathered([parameter], modified_by_rank=0):
                    parameter.copy_(trained[name])
        for name, buffer in module.named_buffers():
            if name in trained:
                buffer.copy_(trained[name])


def shifts_by_module(trained: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """The factors of what was added to each frozen weight (`models.lora_start.shift`), A [rank, in] and B [out, rank]."""
    found = {}
    for name in trained:
        owner, _, leaf = name.rpartition(".")
        if leaf == SHIFT_A:
            module = owner.removeprefix(ADAPTED).removesuffix(".base_layer")
            found[module] = trained[name].float(), trained[f"{owner}.{SHIFT_B}"].float()
    return found


def plain_lora(adapted: Any, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of one plain adapter, by their names in its file, where weights were split or stand on finished adapters;
    empty where neither is so.

    adapted: the PeftModel, whose settings get the new ranks and modules. The sum of two products of low rank is one:
    s B A + D C = [s B, D] [A; C].
    """
    shifts = shifts_by_module(trained)
    if not shifts:
        return {}
    layers = {name.removeprefix(ADAPTED): layer for name, layer in lora_layers(adapted)}
    tensors, ranks = {}, {}
    for module in sorted({*layers, *shifts}):
        prefix, first, second = f"{ADAPTED}{module}", [], []
        if module in layers:
            first.append(trained[f"{prefix}.lora_A.default.weight"].float())
            second.append(trained[f"{prefix}.lora_B.default.weight"].float() * layers[module].scaling["default"])
        if module in shifts:
            first.append(shifts[module][0])
            second.append(shifts[module][1])
        tensors[f"{prefix}.lora_A.weight"] = torch.cat(first)
        tensors[f"{prefix}.lora_B.weight"] = torch.cat(second, dim=1)
        ranks[module] = sum(map(len, first))
    settings = adapted.peft_config["default"]
    settings.r = settings.lora_alpha = Counter(ranks.values()).most_common(1)[0][0]  # the scale is 1, whatever the rank
    settings.use_rslora = False
    settings.rank_pattern = {module: rank for module, rank in ranks.items() if rank != settings.r}
    settings.alpha_pattern = dict(settings.rank_pattern)
    settings.target_modules = sorted(ranks)
    settings.init_lora_weights = True
    return tensors


def replace_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write `tensors` into a safetensors file, beside what else is in it."""
    from safetensors.torch import load_file, save_file

    save_file(load_file(file) | {name: tensor.contiguous() for name, tensor in tensors.items()}, file, {"format": "pt"})
