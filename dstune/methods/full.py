"""method=full: all weights are trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from dstune.config.method_schema import FullConfig
from dstune.config.schema import RunConfig
from dstune.errors import Problem
from dstune.methods._layers import rates_of_layers
from dstune.protocols import Method, method

if TYPE_CHECKING:
    from torch import nn


@method
class Full(Method):
    Config = FullConfig
    config: FullConfig

    moves_weights = True
    same_parameters_throughout = True

    def check_sharded_weights(self, run: RunConfig) -> Iterator[Problem]:
        return iter(())

    def identity(self) -> dict[str, Any]:
        return {}  # its keys are rates: training starts from the model as it is

    def rates(self, module: nn.Module) -> Callable[[str], float]:
        return rates_of_layers(module, self.config.layer_decay)
