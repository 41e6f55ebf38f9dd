"""schedule=linear."""

from __future__ import annotations

from dataclasses import dataclass

from dstune.optim.warmup import DecayConfig, DecaySchedule
from dstune.protocols import schedule


@dataclass(frozen=True)
class LinearConfig(DecayConfig):
    """A straight line from the peak to `min_lr_ratio` times the peak."""

    name: str = "linear"


@schedule
class Linear(DecaySchedule):
    Config = LinearConfig
    config: LinearConfig

    def remaining(self, progress: float) -> float:
        return 1 - progress
