"""Weights that bitsandbytes quantized to 4 bits."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def keep_layout(model: nn.Module) -> None:
    """Keep bitsandbytes from changing the layout of weights for its fast CPU product when the model is evaluated.

    That layout has no backward pass: on CPUs with AVX512-BF16, gradients would stop at the first quantized layer after the first
    evaluation.
    """
    layer: Any
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False


def is_quantized(layer: Any) -> bool:
    """Return whether the base weight of an adapted layer is quantized to 4 bits."""
    return getattr(layer.get_base_layer().weight, "quant_state", None) is not None


def dequantized(weight: Any) -> Tensor:
    """Return the values of a 4-bit weight, [out, in]."""
    import bitsandbytes

    values: Tensor = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
    return values
