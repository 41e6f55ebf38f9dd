"""Stops a run whose loss or gradients are repeatedly not finite."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dstune.config.schema import RunConfig
from dstune.protocols import callback
from dstune.protocols.callback import CONTINUE, Action, Callback, Request, Run, Step


@callback
class NonFinite(Callback):
    """Counts skipped steps and gives up after `trainer.max_nonfinite_steps`.

    An overflow in fp16 is a normal part of finding the loss scale, and does not count, unless the scale cannot fall further.
    """

    name = "nonfinite"
    needs_loss_at_step_end = False
    order = 30

    def __init__(self, config: RunConfig):
        self._limit = config.trainer.max_nonfinite_steps
        self.nonfinite_steps = 0
        """Steps skipped because a loss or gradient was not finite."""
        self.overflow_steps = 0
        """fp16 steps skipped while searching for the loss scale."""

    @classmethod
    def for_run(cls, run: Any) -> NonFinite:
        return cls(run.config)

    def on_step_end(self, run: Run, step: Step) -> Request:
        update = step.update
        if update.applied or update.vetoed:
            return CONTINUE
        if _can_fall(update):
            self.overflow_steps += 1
            return CONTINUE
        self.nonfinite_steps += 1
        if self.nonfinite_steps <= self._limit:
            return CONTINUE
        return Request(
            Action.FAIL,
            f"loss or gradient was not finite in {self.nonfinite_steps} steps, the last one step {step.number} "
            f"(trainer.max_nonfinite_steps={self._limit}): lower optimizer.lr, set trainer.grad_clip, or look at the data",
        )

    def metrics(self, run: Run, step: Step) -> Mapping[str, str]:
        update = step.update
        if update.applied:
            return {}
        reason = "overflow" if _can_fall(update) else "nonfinite"
        return {"skipped": "spike" if update.vetoed else reason}

    def results(self) -> Mapping[str, Any]:
        return self.state_dict()

    def state_dict(self) -> dict[str, Any]:
        return {"nonfinite_steps": self.nonfinite_steps, "overflow_steps": self.overflow_steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.nonfinite_steps, self.overflow_steps = state["nonfinite_steps"], state["overflow_steps"]


def _can_fall(update: Any) -> bool:
    return bool(update.loss_scale > update.lowest_loss_scale)
