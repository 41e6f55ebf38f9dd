"""Gradual unfreezing: the top trains first, and layer after layer joins from above (Howard and Ruder 2018, section 3.3)."""

from __future__ import annotations

import math

from dstune.methods.ulmfit.config import UlmfitConfig
from dstune.trainer.data_loader import DataLoader
from dstune.zero.engine import Engine

Part = tuple[str, ...]
"""Names of the parameters that begin to train together."""


class Unfreezing:
    """Which parts train is a function of the step alone, so there is nothing to save.

    begins: (first step, part) from the top to the bottom. step: where the run goes on, 0 for a new one.
    """

    def __init__(self, begins: list[tuple[int, Part]], engine: Engine, step: int):
        self._begins, self._engine = begins, engine
        for begin, part in begins:
            # A part that begins with the next step is opened by it, with a counter of its own.
            engine.freeze(part) if begin >= step else engine.unfreeze(part, fresh=False)

    def before_step(self, step: int) -> None:
        """Open what begins with `step`; asked before every step."""
        for begin, part in self._begins:
            if begin == step:
                self._engine.unfreeze(part, fresh=True)

    def trained_layers(self, step: int) -> int:
        """Return how many parts are trained in `step`."""
        return sum(begin <= step for begin, _ in self._begins)

    def waiting(self, total_steps: int) -> int:
        """Return how many parts never train in a run of so many steps."""
        return sum(begin >= total_steps for begin, _ in self._begins)


def first_steps(method: UlmfitConfig, parts: tuple[Part, ...], data_loader: DataLoader) -> list[tuple[int, Part]]:
    """Return the step with which each part begins to train, from the top down. parts: from the bottom up."""
    top, *below = reversed(parts)
    at_once = method.layers_at_once
    chunks = [top, *(sum(below[first : first + at_once], ()) for first in range(0, len(below), at_once))]
    return [(_after(method, number, data_loader), chunk) for number, chunk in enumerate(chunks)]


def _after(method: UlmfitConfig, waits: int, data_loader: DataLoader) -> int:
    """Return steps after so many times what the method waits."""
    if method.unfreeze_steps is not None:
        return waits * method.unfreeze_steps
    epochs = waits * method.unfreeze_epochs
    if not epochs:
        return 0
    whole = math.floor(epochs)
    steps = data_loader.steps(whole)
    return steps + round((epochs - whole) * (data_loader.steps(whole + 1) - steps))
