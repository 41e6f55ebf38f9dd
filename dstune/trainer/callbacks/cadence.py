"""Evaluates and saves every so many steps."""

from __future__ import annotations

from typing import Any

from dstune.config.schema import RunConfig
from dstune.protocols import callback
from dstune.protocols.callback import Action, Callback, Request, Run, Step


@callback
class Cadence(Callback):
    """`evaluate.every` and `checkpoint.every`. The last step is evaluated before it is saved."""

    name = "cadence"
    order = 20

    def __init__(self, config: RunConfig, total_steps: int, *, can_evaluate: bool):
        self._can_evaluate, self._total_steps = can_evaluate, total_steps
        self._evaluate_every = config.evaluate.every
        self._save_every = config.checkpoint.every

    @classmethod
    def for_run(cls, run: Any) -> Cadence:
        return cls(run.config, run.total_steps, can_evaluate=run.data.validation is not None)

    def on_step_end(self, run: Run, step: Step) -> Request:
        action = Action.CONTINUE
        due = self._evaluate_every and step.number % self._evaluate_every == 0
        if self._can_evaluate and (due or step.number == self._total_steps):
            action |= Action.EVALUATE
        if self._save_every and step.number % self._save_every == 0:
            action |= Action.SAVE
        return Request(action)
