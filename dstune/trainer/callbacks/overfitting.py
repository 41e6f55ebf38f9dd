"""Compares the held-out loss with the training loss."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from dstune.config.schema import RunConfig
from dstune.protocols import callback, task_of
from dstune.protocols.callback import CONTINUE, Action, Callback, Evaluation, Request, Run, Step

OVERFITTING = "overfitting"
"""Key in the state's results of `training_loss` (the mean since the previous evaluation), `held_out_loss` and `gap`."""


@callback
class Overfitting(Callback):
    """Stops the run if the held-out loss is too far above the training loss (`trainer.early_stopping.max_gap`).

    The training loss is higher than an evaluation of the same rows would be: dropout is on, and earlier weights computed it.
    """

    name = "overfitting"
    order = 45

    def __init__(self, config: RunConfig):
        self._limit = config.trainer.early_stopping.max_gap
        # Not for embeddings, whose loss depends on how many texts are compared at once.
        self._comparable = task_of(config.task).comparable_loss
        self._loss_sum = self._weight = 0.0
        """Sums over the training steps since the last evaluation."""

    @classmethod
    def for_run(cls, run: Any) -> Overfitting:
        return cls(run.config)

    def on_step_agreed(self, run: Run, step: Step) -> Request:
        if math.isfinite(step.loss_sum):
            self._loss_sum += step.loss_sum
            self._weight += step.weight
        return CONTINUE

    def on_evaluate(self, run: Run, evaluation: Evaluation) -> Request:
        results = run.state.results
        if self._comparable and self._weight and "loss" in evaluation.metrics:
            training, held_out = self._loss_sum / self._weight, evaluation.metrics["loss"]
            gap = held_out - training
            results[OVERFITTING] = {"training_loss": training, "held_out_loss": held_out, "gap": gap}
            evaluation.row["eval/gap"] = gap
            self._loss_sum = self._weight = 0.0
        measured = results.get(OVERFITTING)
        if self._limit is None or measured is None or run.state.step == 0 or measured["gap"] < self._limit:
            return CONTINUE
        losses = f"the held-out loss of {measured['held_out_loss']:.4g} is {measured['gap']:.4g} above that of training"
        return Request(Action.STOP, f"overfitting: {losses} (trainer.early_stopping.max_gap={self._limit:g})")

    def state_dict(self) -> dict[str, Any]:
        return {"loss_sum": self._loss_sum, "weight": self._weight}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._loss_sum, self._weight = state["loss_sum"], state["weight"]
