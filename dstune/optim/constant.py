"""schedule=constant."""

from __future__ import annotations

from dataclasses import dataclass

from dstune.config.fields import setting
from dstune.optim.warmup import WarmupConfig, WarmupSchedule
from dstune.protocols import schedule


@dataclass(frozen=True)
class ConstantConfig(WarmupConfig):
    """The peak rate after the warm-up."""

    name: str = "constant"
    warmup_ratio: float = setting(0.0, at_least=0.0, at_most=1.0)
    """Share of the optimizer steps over which the rate rises linearly: step s of w, from 0, has (s + 1) / w of the peak, so that
    no step is spent at a rate of 0 (transformers: s / w)."""


@schedule
class Constant(WarmupSchedule):
    Config = ConstantConfig
    config: ConstantConfig

    def after_warmup(self, step: int, warmup: int, total_steps: int) -> float:
        return 1.0
