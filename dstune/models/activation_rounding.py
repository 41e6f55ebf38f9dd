"""Rounds inputs of linear layers as a server with FP8 activations does."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max


def round_activations(model: nn.Module, settings: Any) -> int:
    """Let `model` round the inputs of its linear layers to FP8 with a scale for each token, if `settings` (`quantization_config` of
    compressed-tensors) say that servers do. Return the number of these layers. Inputs of stacked experts are not rounded."""
    if not _round_tokens(settings):
        return 0
    ignored = settings.get("ignore") or []
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not any(_is_named(name, pattern) for pattern in ignored)
    ]
    for name in names:
        model.get_submodule(name).register_forward_pre_hook(_round_input)
    return len(names)


def _round_tokens(settings: Any) -> bool:
    if not isinstance(settings, Mapping) or settings.get("quant_method") != "compressed-tensors":
        return False
    groups = settings.get("config_groups")
    inputs = [group.get("input_activations") for group in groups.values()] if isinstance(groups, Mapping) else []
    dynamic_fp8 = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
    return len(inputs) == 1 and isinstance(inputs[0], Mapping) and dynamic_fp8.items() <= inputs[0].items()


def _is_named(name: str, pattern: str) -> bool:
    """Return whether `pattern` matches, as in compressed-tensors: the complete name, or a regular expression after `re:`."""
    return re.match(pattern[3:], name) is not None if pattern.startswith("re:") else name == pattern


def _round_input(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    values: Tensor = arguments[0]  # [..., features]
    scales = (values.detach().abs().amax(-1, keepdim=True).float() / LARGEST).clamp_min(torch.finfo(torch.float32).tiny)
    rounded = (values.float() / scales).to(FP8).float() * scales
    return (rounded.to(values.dtype), *arguments[1:])
