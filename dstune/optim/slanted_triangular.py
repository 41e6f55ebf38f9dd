"""schedule=slanted_triangular."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dstune.config.fields import setting
from dstune.protocols import Schedule, schedule
from dstune.protocols.optimizer import ScheduleConfig


@dataclass(frozen=True)
class SlantedTriangularConfig(ScheduleConfig):
    """A short steep rise to the peak, a long fall from it (Howard and Ruder 2018, arXiv:1801.06146)."""

    name: str = "slanted_triangular"
    cut_fraction: float = setting(0.1, above=0.0, below=1.0)
    """Share of the optimizer steps over which the rate rises."""
    ratio: float = setting(32.0, at_least=1.0)
    """How many times smaller than the peak the lowest rate is."""


@schedule
class SlantedTriangular(Schedule):
    Config = SlantedTriangularConfig
    config: SlantedTriangularConfig

    def factor(self, step: int, total_steps: int) -> float:
        # Equation 3 of arXiv:1801.06146, but even a run of few steps has at least one step of rise.
        config = self.config
        cut = max(1, math.floor(config.cut_fraction * total_steps))
        share = step / cut if step < cut else 1 - (step - cut) / (cut * (1 / config.cut_fraction - 1))
        return (1 + max(0.0, share) * (config.ratio - 1)) / config.ratio
