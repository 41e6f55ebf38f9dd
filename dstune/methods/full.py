"""method=full: all weights are trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dstune.config.fields import setting
from dstune.config.schema import RunConfig
from dstune.core.errors import Problem
from dstune.methods._layers import rates_of_layers
from dstune.protocols import Method, method
from dstune.protocols.method import MethodConfig

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class FullConfig(MethodConfig):
    """All weights are trained.

    The most accurate method if you have enough rows and memory: every weight has a gradient and optimizer states.
    """

    name: str = "full"
    layer_decay: float = setting(1.0, above=0.0, at_most=1.0)
    """Rate of a layer as a share of that of the layer above it (arXiv:1801.06146, arXiv:2003.10555); 1 is one rate for all."""


@method
class Full(Method):
    Config = FullConfig
    config: FullConfig

    moves_weights = True
    same_parameters_throughout = True

    def check_sharded_weights(self, run: RunConfig) -> Iterator[Problem]:
        return iter(())

    def identity(self) -> dict[str, Any]:
        return {}  # its only key is a rate: it does not change the model that training starts from

    def rates(self, module: nn.Module) -> Callable[[str], float]:
        return rates_of_layers(module, self.config.layer_decay)
