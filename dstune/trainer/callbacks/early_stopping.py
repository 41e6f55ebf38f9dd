"""Saves the best evaluation, and stops the run if evaluations no longer improve."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from dstune.config.schema import RunConfig
from dstune.core.errors import Problem, UserError
from dstune.metrics import improves
from dstune.protocols import callback
from dstune.protocols.callback import CONTINUE, Action, Callback, Evaluation, Request, Run
from dstune.trainer.state import Best


@callback
class EarlyStopping(Callback):
    """Saves the best evaluation of trained weights; stops after `patience` evaluations without a gain."""

    name = "early_stopping"
    order = 40

    def __init__(self, config: RunConfig):
        self._settings = config.trainer.early_stopping
        self._saves_best = config.trainer.early_stopping.patience > 0 or config.run.export.value == "best"
        self._without_gain = 0
        self._warned = False

    @classmethod
    def for_run(cls, run: Any) -> EarlyStopping:
        return cls(run.config)

    def on_evaluate(self, run: Run, evaluation: Evaluation) -> Request:
        state, metrics, metric = run.state, evaluation.metrics, self._settings.metric
        if state.step == 0:  # untrained weights have no checkpoint to go back to
            return CONTINUE
        if metric in evaluation.missing:  # neither a gain nor none
            return CONTINUE
        if metric not in metrics:  # on all ranks alike
            reason = "these rows and labels have no such metric"
            raise UserError(Problem("trainer.early_stopping.metric", reason, f"one of {', '.join(metrics)}", metric))
        if run.log and not self._warned and not math.isfinite(metrics[metric]):
            self._warned = True
            reason = f"{metric} is {metrics[metric]} in the evaluation after step {state.step}"
            run.log.message(f"warning: {reason}, which is never the best one (trainer.early_stopping.metric)")
        best = state.best.value if state.best else None
        if improves(metric, metrics[metric], best, self._settings.min_delta):
            state.best = Best(metric, metrics[metric], state.step)
            self._without_gain = 0
            return Request(Action.SAVE if self._saves_best else Action.CONTINUE)
        self._without_gain += 1
        if not self._settings.patience or self._without_gain < self._settings.patience:
            return CONTINUE
        best_so_far = f"improved on {state.best.value:.4g} (step {state.best.step})" if state.best else "been finite"
        reason = f"early stopping: {metric} has not {best_so_far} for {self._without_gain} evaluations"
        return Request(Action.STOP, reason)

    def state_dict(self) -> dict[str, Any]:
        return {"evaluations_without_gain": self._without_gain}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._without_gain = state["evaluations_without_gain"]
