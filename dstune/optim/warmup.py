"""Base classes of schedules that begin with a linear warm-up."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dstune.config.convert import format_value
from dstune.config.fields import setting
from dstune.core.errors import Problem
from dstune.protocols import Schedule
from dstune.protocols.optimizer import ScheduleConfig


@dataclass(frozen=True)
class WarmupConfig(ScheduleConfig):
    """Keys of the warm-up."""

    warmup_ratio: float = setting(0.03, at_least=0.0, at_most=1.0)
    """Share of the optimizer steps over which the rate rises linearly: step s of w, from 0, has (s + 1) / w of the peak, so that
    no step is spent at a rate of 0 (transformers: s / w)."""
    warmup_steps: int | None = setting(None, at_least=0)
    """Warm-up in optimizer steps, as `warmup_ratio`, which it replaces when given."""


@dataclass(frozen=True)
class DecayConfig(WarmupConfig):
    """Keys of the warm-up and the decay."""

    min_lr_ratio: float = setting(0.0, at_least=0.0, at_most=1.0)
    """Final rate as a share of the peak."""


class WarmupSchedule(Schedule):
    """Base of schedules that begin with a linear warm-up.

    The warm-up's last step and the step after it both have the peak rate. Step s (from 0) of d decaying steps has a progress of
    s / d, so the last step is still above the final rate: no step is spent at a rate of zero.
    """

    Config = WarmupConfig
    config: Any

    @property
    def decay_ratio(self) -> float:
        """Share of the run that the warm-up must leave for the decay."""
        return 0.0

    def after_warmup(self, step: int, warmup: int, total_steps: int) -> float:
        """Return the rate of a step after the first `warmup` steps, as a share of the peak."""
        raise NotImplementedError

    def warmup_steps(self, total_steps: int) -> int:
        """Return the steps of the warm-up."""
        if self.config.warmup_steps is not None:
            return int(self.config.warmup_steps)
        return math.ceil(self.config.warmup_ratio * total_steps)

    def factor(self, step: int, total_steps: int) -> float:
        warmup = self.warmup_steps(total_steps)
        return (step + 1) / warmup if step < warmup else self.after_warmup(step, warmup, total_steps)

    def check(self, max_steps: int | None) -> Iterator[Problem]:
        schedule, decay = self.config, self.decay_ratio
        if schedule.warmup_steps is None:
            if schedule.warmup_ratio + decay > 1:
                yield Problem(
                    "schedule.warmup_ratio + schedule.decay_ratio",
                    "warm-up and decay together are longer than the run",
                    "let them sum to at most 1",
                    f"{schedule.warmup_ratio:g} + {decay:g}",
                )
        elif max_steps is None or max_steps < 1:  # refused for itself
            return
        elif schedule.warmup_steps > max_steps:
            yield Problem(
                "schedule.warmup_steps",
                f"the run ends before its warm-up (trainer.max_steps={max_steps})",
                f"schedule.warmup_steps={max_steps // 10}, or more steps",
                format_value(schedule.warmup_steps),
            )
        elif schedule.warmup_steps + decay * max_steps > max_steps:
            yield Problem(
                "schedule.warmup_steps",
                f"warm-up and decay ({decay:g} of {max_steps} steps) together are longer than the run",
                "give fewer warm-up steps or a smaller schedule.decay_ratio",
                format_value(schedule.warmup_steps),
            )

    def without_effect(self) -> Iterator[tuple[str, tuple[str, str]]]:
        if (steps := self.config.warmup_steps) is not None:
            yield "schedule.warmup_ratio", (f"schedule.warmup_steps={steps} replaces it", "schedule.warmup_steps=null")


class DecaySchedule(WarmupSchedule):
    """Base of schedules that decay from the peak, right after the warm-up, to `min_lr_ratio` times the peak."""

    def remaining(self, progress: float) -> float:
        """Return the share of the decay that remains, from 1 to 0. progress: 0 at the peak, 1 at the end."""
        raise NotImplementedError

    def after_warmup(self, step: int, warmup: int, total_steps: int) -> float:
        least, progress = self.config.min_lr_ratio, (step - warmup) / max(1, total_steps - warmup)
        return float(least + (1 - least) * self.remaining(min(1.0, progress)))
