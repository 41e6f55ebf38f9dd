"""Parses how often a run evaluates and saves (`evaluate.every`, `checkpoint.every`).

A cadence is a number of optimizer steps, of passes over the training rows (`1 epoch`), or a share of the run (`25%`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from fractions import Fraction
from math import ceil

from dstune.config.convert import format_value
from dstune.config.schema import RunConfig
from dstune.core.errors import Problem

PATTERN = re.compile(r"(\d+(?:\.\d+)?) *(%|epochs?)")
AUTO = "auto"
FEWEST_STEPS_APART = 5
"""Minimum distance of two evaluations with `auto`, so that a short run is not evaluated after every step."""
ROUNDING = 1e-9
"""Tolerance in epochs: far above the rounding error of `epoch + step / steps`, far below one step's share of an epoch."""


class Unit(Enum):
    steps = "steps"
    epochs = "epochs"
    run = "run"


@dataclass(frozen=True)
class Cadence:
    amount: Fraction
    unit: Unit
    apart: int = 0
    """Minimum number of steps between two occurrences."""

    def due(self, step: int, total_steps: int, epoch_before: float | None, epoch: float) -> bool:
        """Return whether the event is due after optimizer step `step` (counted from 1) of `total_steps`.

        epoch_before, epoch: passes over the rows before and after the step; `epoch_before` is None if it is not known.
        """
        if not self.amount:
            return False
        if self.unit is Unit.epochs:
            periods = epoch / float(self.amount)
            if epoch_before is None:
                return abs(periods - round(periods)) < ROUNDING
            return int(periods + ROUNDING) > int(epoch_before / float(self.amount) + ROUNDING)
        share = self.amount * total_steps if self.unit is Unit.run else self.amount
        period = max(share, Fraction(self.apart))
        return step // period > (step - 1) // period

    def times(self, total_steps: int, epochs: float | None) -> int | None:
        """Return how often the event happens in a run, including its end; None if that is not known.

        epochs: passes over the rows in `total_steps`; if None, the count of a cadence in passes is not known.
        """
        if not self.amount:
            return 1
        if epochs is None and self.unit is Unit.epochs:
            return None
        length = {Unit.steps: total_steps, Unit.epochs: epochs or 0.0, Unit.run: 1}[self.unit]
        amount = max(self.amount, Fraction(self.apart, total_steps)) if self.apart else self.amount
        return max(1, min(total_steps, ceil(length / amount)))

    def first_step(self, total_steps: int | None) -> int | None:
        """Return the optimizer step after which the event first happens; None if that is not known, as for passes over the rows."""
        if self.unit is Unit.steps:
            return int(self.amount)
        if self.unit is Unit.epochs or total_steps is None:
            return None
        return min(total_steps, max(ceil(self.amount * total_steps), self.apart))


def cadence(every: int | str) -> Cadence:
    """Parse a value of `evaluate.every` or `checkpoint.every`. Raises ValueError for a text that is no cadence."""
    if every == AUTO:
        return Cadence(Fraction(1, 4), Unit.run, FEWEST_STEPS_APART)
    if isinstance(every, int):
        return Cadence(Fraction(every), Unit.steps)
    match = PATTERN.fullmatch(every.strip())
    amount = Fraction(match[1]).limit_denominator(1000) if match else Fraction(0)  # 0.333333 is a third
    if match is None or not amount or (match[2] == "%" and amount > 100):
        raise ValueError(every)
    return Cadence(amount / 100, Unit.run) if match[2] == "%" else Cadence(amount, Unit.epochs)


def first_evaluation(config: RunConfig) -> int | None:
    """Return the optimizer step after which a run first evaluates; None if the configuration alone does not determine it."""
    with suppress(ValueError):
        return cadence(config.evaluate.every).first_step(config.trainer.max_steps)
    return None


def check_cadences(config: RunConfig) -> Iterator[Problem]:
    for key, every in (("evaluate.every", config.evaluate.every), ("checkpoint.every", config.checkpoint.every)):
        try:
            cadence(every)
        except ValueError:
            reason = (
                "expected optimizer steps (0: at the end only), passes over the rows, or a share of the run up to 100%"
            )
            yield Problem(key, reason, f'{key}=50, {key}="1 epoch" or {key}=25%', format_value(every))
