"""schedule=cosine."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dstune.optim.warmup import DecayConfig, WarmupSchedule
from dstune.protocols import schedule


@dataclass(frozen=True)
class CosineConfig(DecayConfig):
    """Half a cosine from the peak to `min_lr_ratio` times the peak."""

    name: str = "cosine"


@schedule
class Cosine(WarmupSchedule):
    Config = CosineConfig
    config: CosineConfig

    def after_warmup(self, step: int, warmup: int, total_steps: int) -> float:
        least, progress = self.config.min_lr_ratio, (step - warmup) / max(1, total_steps - warmup)
        return least + (1 - least) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
