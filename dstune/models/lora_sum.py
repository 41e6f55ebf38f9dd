"""Computes a linear layer and its LoRA adapter with a fused multiply-add.

peft computes `base(x) + B(A(x)) * scaling`, which holds three tensors of the output's size at once, and takes two passes over them
in the backward pass. BLAS's gemm with alpha and beta scales the product and adds it to the layer's output: one tensor, rounded once
instead of three times.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from dstune.zero.parts import is_partitioned


def use_joint_sums(module: nn.Module) -> int:
    """Let the linear layers with plain LoRA compute with a fused multiply-add; return how many do.

    Other layers keep peft's computation: those with DoRA, biases or 4-bit weights, and partitioned adapters, since ZeRO-3 gathers
    weights only when their own module is called.
    """
    if not hasattr(module, "peft_config"):
        return 0
    from peft.tuners.lora.layer import Linear

    layers = [layer for layer in module.modules() if type(layer) is Linear and _is_plain(layer)]
    for layer in layers:
        layer.forward = partial(_forward, layer, layer.forward)
    return len(layers)


def _is_plain(layer: Any) -> bool:
    adapters = [*layer.lora_A.values(), *layer.lora_B.values()]
    if layer.lora_variant or any(adapter.bias is not None for adapter in adapters):
        return False
    weights = [layer.base_layer.weight, *(adapter.weight for adapter in adapters)]
    return len({weight.dtype for weight in weights}) == 1 and not any(map(is_partitioned, weights))


def _forward(
    layer: Any, peft_forward: Callable[..., torch.Tensor], x: torch.Tensor, *others: Any, **keywords: Any
) -> torch.Tensor:
    """Run the layer on x [..., inputs]; with peft's own forward if adapters are off or merged, or if several are active."""
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.disable_adapters or layer.merged or others or keywords or len(names) != 1:
        return peft_forward(x, *others, **keywords)
    (name,) = names
    weight = layer.lora_B[name].weight
    if x.dtype != weight.dtype or x.dim() < 2:
        return peft_forward(x)
    result = layer.base_layer(x)
    low = layer.lora_A[name](layer.lora_dropout[name](x))
    joint = torch.addmm(result.flatten(0, -2), low.flatten(0, -2), weight.t(), alpha=layer.scaling[name])
    return joint.view_as(result)
