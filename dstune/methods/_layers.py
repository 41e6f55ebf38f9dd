"""Learning rates by layer (`layer_decay`), shared by several methods."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def rates_of_layers(module: nn.Module, decay: float) -> Callable[[str], float]:
    """Return a function that maps a parameter's name to its factor on the learning rate. Each layer has `decay` times the rate of
    the layer above it."""
    if decay == 1:
        return lambda name: 1.0
    from transformers import PreTrainedModel

    from dstune.models.layers import decayed_rates, layers_of

    assert isinstance(module, PreTrainedModel)
    return decayed_rates(layers_of(module), decay).__getitem__
