"""schedule=cosine."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dstune.optim.warmup import DecayConfig, DecaySchedule
from dstune.protocols import schedule


@dataclass(frozen=True)
class CosineConfig(DecayConfig):
    """Half a cosine from the peak to `min_lr_ratio` times the peak."""

    name: str = "cosine"


@schedule
class Cosine(DecaySchedule):
    Config = CosineConfig
    config: CosineConfig

    def remaining(self, progress: float) -> float:
        return 0.5 * (1 + math.cos(math.pi * progress))
