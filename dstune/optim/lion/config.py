"""Keys of optimizer=lion."""

from __future__ import annotations

from dataclasses import dataclass

from dstune.config.fields import setting
from dstune.protocols.optimizer import OptimizerConfig


@dataclass(frozen=True)
class LionConfig(OptimizerConfig):
    """Updates by the sign of a momentum, with one state a parameter where AdamW has two (Chen et al. 2023, arXiv:2302.06675)."""

    name: str = "lion"
    lr: float = setting(2e-6, at_least=0.0, by_method=True)
    """Peak learning rate; if unset, a tenth of the rate for AdamW (docs/optimizers.md)."""
    weight_decay: float = setting(0.1, at_least=0.0)
    """Weight decay; never applied to norms and biases."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Share of the momentum in the update, and decay rate of the momentum, each in [0, 1)."""
