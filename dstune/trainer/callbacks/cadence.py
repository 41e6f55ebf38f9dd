"""Evaluates and saves at the steps that `evaluate.every` and `checkpoint.every` name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dstune.config.cadence import Unit, cadence
from dstune.config.schema import RunConfig
from dstune.protocols import callback
from dstune.protocols.callback import Action, Callback, Request, Run, Step


@callback
class Cadence(Callback):
    """`evaluate.every` and `checkpoint.every`. The last step is evaluated before it is saved."""

    name = "cadence"
    needs_loss_at_step_end = False
    order = 20

    def __init__(self, config: RunConfig, total_steps: int, *, can_evaluate: bool, begins: bool = True):
        """begins: the run starts at step 0."""
        self._can_evaluate, self._total_steps = can_evaluate, total_steps
        self._evaluate, self._save = cadence(config.evaluate.every), cadence(config.checkpoint.every)
        self._epoch: float | None = 0.0 if begins else None
        """Passes over the rows so far. None before the first step of a resumed run whose checkpoint does not have them."""

    @classmethod
    def for_run(cls, run: Any) -> Cadence:
        can_evaluate = run.data.validation is not None
        return cls(run.config, run.total_steps, can_evaluate=can_evaluate, begins=run.state.step == 0)

    def on_step_end(self, run: Run, step: Step) -> Request:
        action = Action.CONTINUE
        passes = (self._epoch, step.epoch)
        self._epoch = step.epoch
        due = self._evaluate.due(step.number, self._total_steps, *passes)
        if self._can_evaluate and (due or step.number == self._total_steps):
            action |= Action.EVALUATE
        if self._save.due(step.number, self._total_steps, *passes):
            action |= Action.SAVE
        return Request(action)

    def state_dict(self) -> dict[str, Any]:
        counts_passes = Unit.epochs in (self._evaluate.unit, self._save.unit)
        return {"epoch": self._epoch} if counts_passes else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._epoch = state.get("epoch", self._epoch)
