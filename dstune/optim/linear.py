"""schedule=linear."""

from __future__ import annotations

from dataclasses import dataclass

from dstune.optim.warmup import DecayConfig, WarmupSchedule
from dstune.protocols import schedule


@dataclass(frozen=True)
class LinearConfig(DecayConfig):
    """A straight line from the peak to `min_lr_ratio` times the peak."""

    name: str = "linear"


@schedule
class Linear(WarmupSchedule):
    Config = LinearConfig
    config: LinearConfig

    def after_warmup(self, step: int, warmup: int, total_steps: int) -> float:
        least, progress = self.config.min_lr_ratio, (step - warmup) / max(1, total_steps - warmup)
        return least + (1 - least) * (1 - min(1.0, progress))
