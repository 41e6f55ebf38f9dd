"""A rate for each layer (`layer_decay`), which several methods have."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def rates_of_layers(module: nn.Module, decay: float) -> Callable[[str], float]:
    """Return a function from a parameter's name to its factor on the learning rate: each layer has `decay` times the rate of the
    one above it."""
    if decay == 1:
        return lambda name: 1.0
    from transformers import PreTrainedModel

    from dstune.models.layers import decayed_rates, layers_of

    assert isinstance(module, PreTrainedModel)
    return decayed_rates(layers_of(module), decay).__getitem__
