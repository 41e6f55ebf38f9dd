"""schedule=deepspeed: the rates of DeepSpeed's `WarmupLR`, `WarmupDecayLR` and `WarmupCosineLR`, step for step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from dstune.config.fields import setting
from dstune.optim.warmup import WarmupConfig
from dstune.protocols import Schedule, schedule


class Decay(Enum):
    none = "none"
    linear = "linear"
    cosine = "cosine"


class WarmupType(Enum):
    log = "log"
    linear = "linear"


@dataclass(frozen=True)
class DeepSpeedScheduleConfig(WarmupConfig):
    """The schedules of DeepSpeed's configuration: `zero=file` chooses this one."""

    name: str = "deepspeed"
    decay: Decay = Decay.none
    """What follows the warm-up: `none` as in DeepSpeed's WarmupLR, `linear` as in WarmupDecayLR, `cosine` as in WarmupCosineLR."""
    warmup_type: WarmupType = WarmupType.log
    """How the rate rises: with the logarithm of the step, or linearly."""
    start_lr_ratio: float = setting(0.0, at_least=0.0)
    """Rate of the first step as a share of the peak; with `decay=linear`, also the rate that the decay ends at."""
    total_steps: int | None = setting(None, at_least=1)
    """Optimizer steps, with the warm-up, after which the decay ends; the run's length when not given."""
    min_lr_ratio: float = setting(0.0001, at_least=0.0, at_most=1.0)
    """Rate that `decay=cosine` ends at, as a share of the peak."""


@schedule
class DeepSpeedSchedule(Schedule):
    """DeepSpeed sets the rate of the next step after each step, and counts from the second one. So the first two steps of a warm-up
    have its initial rate."""

    Config = DeepSpeedScheduleConfig
    config: DeepSpeedScheduleConfig

    def factor(self, step: int, total_steps: int) -> float:
        config, last = self.config, step - 1  # the step that DeepSpeed's schedule counts
        warmup = self._warmup_steps(total_steps)
        if config.decay is Decay.cosine and last < 0 and warmup:
            return 0.0  # whatever the warm-up begins with
        if last < warmup:
            return config.start_lr_ratio + (1 - config.start_lr_ratio) * self._risen(max(0, last), warmup)
        end = config.total_steps or total_steps
        if config.decay is Decay.linear:
            remaining = max(0.0, (end - last) / max(1.0, end - warmup))
            return config.start_lr_ratio + (1 - config.start_lr_ratio) * remaining
        if config.decay is Decay.cosine:
            progress = min(1.0, (last - warmup + 1) / max(1, end - warmup))
            remaining = (1 + math.cos(math.pi * progress)) / 2
            return config.min_lr_ratio + (1 - config.min_lr_ratio) * remaining
        return 1.0

    def _warmup_steps(self, total_steps: int) -> int:
        """Return the steps of the warm-up: DeepSpeed's has at least two."""
        steps = self.config.warmup_steps
        steps = math.ceil(self.config.warmup_ratio * total_steps) if steps is None else steps
        return max(2, steps) if steps else 0

    def _risen(self, last: int, warmup: int) -> float:
        """Return the share of the rise that is done, from 0 to 1."""
        return math.log(last + 1) / math.log(warmup) if self.config.warmup_type is WarmupType.log else last / warmup

    def without_effect(self) -> Iterator[tuple[str, tuple[str, str]]]:
        decay = self.config.decay
        if (steps := self.config.warmup_steps) is not None:
            yield "schedule.warmup_ratio", (f"schedule.warmup_steps={steps} replaces it", "schedule.warmup_steps=null")
        if decay is not Decay.cosine:
            yield "schedule.min_lr_ratio", (f"schedule.decay is {decay.name}", "schedule.decay=cosine")
        if decay is Decay.none:
            yield "schedule.total_steps", ("schedule.decay is none", "schedule.decay=linear")
