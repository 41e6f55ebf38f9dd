"""optimizer=sgd."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dstune.config.fields import setting
from dstune.protocols import Optimizer, optimizer
from dstune.protocols.optimizer import OptimizerConfig

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class SgdConfig(OptimizerConfig):
    """Stochastic gradient descent with momentum."""

    name: str = "sgd"
    lr: float = setting(1e-3, at_least=0.0)
    """Peak learning rate."""
    weight_decay: float = setting(0.0, at_least=0.0)
    """L2 penalty; never applied to norms and biases."""
    momentum: float = setting(0.0, at_least=0.0, below=1.0)
    """Momentum factor."""


@optimizer
class Sgd(Optimizer):
    Config = SgdConfig
    config: SgdConfig

    @property
    def states_per_parameter(self) -> int:
        return 1 if self.config.momentum else 0

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        import torch

        return torch.optim.SGD(groups, lr=self.config.lr, momentum=self.config.momentum)
