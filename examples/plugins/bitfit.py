"""method=bitfit: only biases and the task's own head are trained (Ben Zaken et al. 2022, arXiv:2106.10199).

dstune train plugins=[examples/plugins/bitfit.py] method=bitfit ...
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import dstune
from dstune.protocols.method import MethodConfig

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class BitFitConfig(MethodConfig):
    """About a thousandth of the weights, as part of the model: the export is a whole model."""

    name: str = "bitfit"
    norms: bool = False
    """Train the weights of norms too."""


@dstune.method
class BitFit(dstune.Method):
    Config = BitFitConfig
    config: BitFitConfig

    learning_rate = 1e-3
    moves_weights = True
    same_parameters_throughout = True

    def apply(self, model: Any, run: Any) -> nn.Module:
        from dstune.models.load import new_weights

        new = new_weights(model)
        if new.rows:
            problem = dstune.Problem(
                "method", "added tokens have to be trained, and their rows are no biases", "method=lora"
            )
            raise dstune.UserError(problem)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self._is_trained(name) or name in new.parameters)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise dstune.UserError(dstune.Problem("method", "the model has no biases", "method=lora", self.name))
        return model

    def trained(self, model: Any) -> tuple[tuple[Any, ...], int]:
        trained = tuple(tensor for tensor in model.tensors if self._is_trained(tensor.name))
        return trained, model.parameters - sum(tensor.count for tensor in trained)

    def check(self, run: Any) -> Iterator[dstune.Problem]:
        if run.trainer.mlp_tiles > 1:
            yield dstune.Problem(
                "trainer.mlp_tiles", "layers without trained weights need no tiles", "trainer.mlp_tiles=1"
            )

    def _is_trained(self, name: str) -> bool:
        return name.endswith(".bias") or (self.config.norms and "norm" in name.lower())
