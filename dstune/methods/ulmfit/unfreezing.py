"""Gradual unfreezing: the top layer trains first, then one layer after another below (Howard and Ruder 2018, section 3.3)."""

from __future__ import annotations

import math

from dstune.methods.ulmfit.config import UlmfitConfig
from dstune.trainer.data_loader import DataLoader
from dstune.zero.engine import Engine

Part = tuple[str, ...]
"""Names of parameters that begin to train in the same step."""


class Unfreezing:
    """Unfreezes each part at its step. Only the step decides which parts train, so there is nothing to save.

    begins: (first step, part) from the top to the bottom. step: the next step of the run, 0 for a new run.
    """

    def __init__(self, begins: list[tuple[int, Part]], engine: Engine, step: int):
        self._begins, self._engine = begins, engine
        for begin, part in begins:
            # `before_step` unfreezes a part that begins with the next step, with a fresh step counter.
            engine.freeze(part) if begin >= step else engine.unfreeze(part, fresh=False)

    def before_step(self, step: int) -> None:
        """Unfreeze the parts that begin with `step`. Called before every step."""
        for begin, part in self._begins:
            if begin == step:
                self._engine.unfreeze(part, fresh=True)

    def trained_layers(self, step: int) -> int:
        """Return the number of parts that train in `step`."""
        return sum(begin <= step for begin, _ in self._begins)

    def waiting(self, total_steps: int) -> int:
        """Return the number of parts that never train in a run of `total_steps` steps."""
        return sum(begin >= total_steps for begin, _ in self._begins)


def first_steps(method: UlmfitConfig, parts: tuple[Part, ...], data_loader: DataLoader) -> list[tuple[int, Part]]:
    """Return (first step, part) from the top down. parts: from the bottom up; below the top, `layers_at_once` are joined."""
    top, *below = reversed(parts)
    at_once = method.layers_at_once
    chunks = [top, *(sum(below[first : first + at_once], ()) for first in range(0, len(below), at_once))]
    return [(_after(method, number, data_loader), chunk) for number, chunk in enumerate(chunks)]


def _after(method: UlmfitConfig, waits: int, data_loader: DataLoader) -> int:
    """Return the number of steps in `waits` times the method's waiting time, which is in steps or epochs."""
    if method.unfreeze_steps is not None:
        return waits * method.unfreeze_steps
    epochs = waits * method.unfreeze_epochs
    if not epochs:
        return 0
    whole = math.floor(epochs)
    steps = data_loader.steps(whole)
    return steps + round((epochs - whole) * (data_loader.steps(whole + 1) - steps))
