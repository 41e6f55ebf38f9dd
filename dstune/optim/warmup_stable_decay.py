"""schedule=warmup_stable_decay."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dstune.config.fields import setting
from dstune.optim.warmup import WarmupConfig, WarmupSchedule
from dstune.protocols import schedule


@dataclass(frozen=True)
class WarmupStableDecayConfig(WarmupConfig):
    """Constant at the peak, then a linear decay (Hu et al. 2024, arXiv:2404.06395)."""

    name: str = "warmup_stable_decay"
    decay_ratio: float = setting(0.2, at_least=0.0, at_most=1.0)
    """Share of the optimizer steps, at the end, over which the rate falls."""
    min_lr_ratio: float = setting(0.0, at_least=0.0, at_most=1.0)
    """Final rate as a share of the peak."""


@schedule
class WarmupStableDecay(WarmupSchedule):
    Config = WarmupStableDecayConfig
    config: WarmupStableDecayConfig

    @property
    def decay_ratio(self) -> float:
        return self.config.decay_ratio

    def after_warmup(self, step: int, warmup: int, total_steps: int) -> float:
        least, decay = self.config.min_lr_ratio, math.ceil(self.config.decay_ratio * total_steps)
        start = total_steps - decay
        if step < start:
            return 1.0
        progress = (step - start) / max(1, decay)
        return least + (1 - least) * (1 - min(1.0, progress))
