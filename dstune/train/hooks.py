"""What may interrupt the loop after a step. A hook asks; the loop acts once all ranks agree on what any of them asked."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntFlag
from pathlib import Path
from types import FrameType

from dstune.config.schema import RunConfig
from dstune.errors import Problem, UserError
from dstune.paths import PRUNE_FILE, SAVE_FILE, SIGNAL_FILE, STOP_FILE, STOP_REASON
from dstune.train.better import improves
from dstune.train.state import Best, TrainState
from dstune.zero.engine import Update

SAVES_BEFORE_DEADLINE = 3.0

SAME_REQUEST_SECONDS = 1.0
"""Who signals a whole process group or cgroup reaches a rank twice: by itself, and through its launcher."""

OVERFITTING = "overfitting"
"""Where the state keeps `training_loss` (the mean since the evaluation before), `held_out_loss` and `gap`, their difference."""


class Wish(IntFlag):
    """What a hook asks for; wishes of several hooks and ranks are joined."""

    NOTHING = 0
    EVALUATE = 1
    SAVE = 2
    STOP = 4
    """End the run as planned: evaluate, save, done."""
    PREEMPT = 8
    """Save and leave, to be continued."""
    FAIL = 16
    """Leave without a save: the weights cannot be trusted."""
    PRUNE = 32
    """Leave without a save: the sweep that the run is a trial of has seen enough."""


UNSAVED = Wish.FAIL | Wish.PRUNE
LEAVING = Wish.PREEMPT | UNSAVED


@dataclass(frozen=True)
class Decision:
    wish: Wish
    reason: str = ""


CONTINUE = Decision(Wish.NOTHING)


class Hook:
    """Asked after each step and each evaluation; may differ between ranks."""

    def after_step(self, state: TrainState, update: Update) -> Decision:
        return CONTINUE

    def while_waiting(self, state: TrainState) -> Decision:
        """Asked again and again between two steps while a rank waits for rows."""
        return CONTINUE

    def after_evaluation(self, state: TrainState, metrics: dict[str, float]) -> Decision:
        return CONTINUE


def join(decisions: list[Decision]) -> Decision:
    wish = Wish.NOTHING
    for decision in decisions:
        wish |= decision.wish
    return Decision(wish, "; ".join(decision.reason for decision in decisions if decision.reason))


class Cadence(Hook):
    """Evaluation and saving every so many steps; the last step is evaluated before it is saved."""

    def __init__(self, config: RunConfig, total_steps: int, *, can_evaluate: bool):
        self._can_evaluate, self._total_steps = can_evaluate, total_steps
        self._evaluate_every = config.evaluate.every
        self._save_every = config.checkpoint.every

    def after_step(self, state: TrainState, update: Update) -> Decision:
        wish = Wish.NOTHING
        due = self._evaluate_every and state.step % self._evaluate_every == 0
        if self._can_evaluate and (due or state.step == self._total_steps):
            wish |= Wish.EVALUATE
        if self._save_every and state.step % self._save_every == 0:
            wish |= Wish.SAVE
        return Decision(wish)


class NonFinite(Hook):
    """Counts skipped steps and gives up after `trainer.max_nonfinite_steps`.

    An overflow of the fp16 loss scale is part of finding the scale, not a fault, unless the scale cannot fall further.
    """

    def __init__(self, config: RunConfig):
        self._limit = config.trainer.max_nonfinite_steps

    def after_step(self, state: TrainState, update: Update) -> Decision:
        if update.applied or update.vetoed:
            return CONTINUE
        if update.loss_scale > 1.0:
            state.overflow_steps += 1
            return CONTINUE
        state.nonfinite_steps += 1
        if state.nonfinite_steps <= self._limit:
            return CONTINUE
        return Decision(
            Wish.FAIL,
            f"loss or gradient was not finite in {state.nonfinite_steps} steps, the last one step {state.step} "
            f"(trainer.max_nonfinite_steps={self._limit}): lower optimizer.lr, set trainer.grad_clip, or look at the data",
        )


class Overfitting(Hook):
    """Stops where held-out rows have fallen too far behind those that are trained on (`trainer.early_stopping.max_gap`)."""

    def __init__(self, config: RunConfig):
        self._limit = config.trainer.early_stopping.max_gap

    def after_evaluation(self, state: TrainState, metrics: dict[str, float]) -> Decision:
        found = state.extra.get(OVERFITTING)
        if self._limit is None or found is None or state.step == 0 or found["gap"] < self._limit:
            return CONTINUE
        losses = f"the held-out loss of {found['held_out_loss']:.4g} is {found['gap']:.4g} above that of training"
        return Decision(Wish.STOP, f"overfitting: {losses} (trainer.early_stopping.max_gap={self._limit:g})")


class EarlyStopping(Hook):
    """Keeps the best evaluation of trained weights; stops after `patience` evaluations without a gain."""

    def __init__(self, config: RunConfig):
        self._settings = config.trainer.early_stopping
        self._saves_best = config.trainer.early_stopping.patience > 0 or config.run.export.value == "best"

    def after_evaluation(self, state: TrainState, metrics: dict[str, float]) -> Decision:
        if state.step == 0:  # untrained weights are no result: there is no checkpoint of them to go back to
            return CONTINUE
        metric = self._settings.metric
        if metric not in metrics:  # on all ranks alike
            reason = "these rows and labels have no such metric"
            raise UserError(Problem("trainer.early_stopping.metric", reason, f"one of {', '.join(metrics)}", metric))
        best = state.best.value if state.best else None
        if improves(metric, metrics[metric], best, self._settings.min_delta):
            state.best = Best(metric, metrics[metric], state.step)
            state.evaluations_without_gain = 0
            return Decision(Wish.SAVE if self._saves_best else Wish.NOTHING)
        state.evaluations_without_gain += 1
        if not self._settings.patience or state.evaluations_without_gain < self._settings.patience:
            return CONTINUE
        best_so_far = f"improved on {state.best.value:.4g} (step {state.best.step})" if state.best else "been finite"
        return Decision(
            Wish.STOP,
            f"early stopping: {metric} has not {best_so_far} for {state.evaluations_without_gain} evaluations",
        )


class Preemption(Hook):
    """A signal (`run.signals`), the end of the time or a file named STOP in the run directory asks for a save after this
    step and exit 75; a file named SAVE for a save alone, one named PRUNE for the end without a save. A second signal ends
    at once, unless it comes within `SAME_REQUEST_SECONDS` of the first.

    The time is `run.time_limit`, or what SLURM says (SLURM_JOB_END_TIME); the save begins early enough to take
    `SAVES_BEFORE_DEADLINE` times as long as the last one.
    """

    def __init__(self, config: RunConfig, started: float, run_dir: Path, *, is_main: bool):
        """started: by `time.monotonic`, which no change of the clock moves. is_main: the rank that looks for the files
        and removes them."""
        minutes = config.run.time_limit
        self._limits: list[tuple[Callable[[], float], float, str]] = []
        if minutes is not None:
            reason = f"run.time_limit={minutes:g} minutes is over"
            self._limits.append((time.monotonic, started + 60 * minutes, reason))
        if (end := os.environ.get("SLURM_JOB_END_TIME", "")).isdigit():
            self._limits.append((time.time, float(end), "the time of the SLURM job is over"))
        self._files = (run_dir / PRUNE_FILE, run_dir / STOP_FILE, run_dir / SAVE_FILE) if is_main else ()
        self._handed_on = run_dir / "logs" / SIGNAL_FILE
        self._last_asked, self._step_seconds = time.monotonic(), 0.0
        self._received: str | None = None
        self._received_at = 0.0
        if threading.current_thread() is threading.main_thread():
            # SIGTERM in any case: that is how the launcher hands a signal on.
            for name in {*config.run.signals, "SIGTERM"}:
                signal.signal(signal.Signals[name], self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._received is not None:
            if now - self._received_at < SAME_REQUEST_SECONDS:
                return
            # The default action, delivered to ourselves: ends at once even inside a collective that will never return.
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self._received, self._received_at = signal.Signals(number).name, now

    def after_step(self, state: TrainState, update: Update) -> Decision:
        self._step_seconds = time.monotonic() - self._last_asked
        return self.while_waiting(state)

    def while_waiting(self, state: TrainState) -> Decision:
        self._last_asked = time.monotonic()
        if self._received is not None:
            return Decision(Wish.PREEMPT, f"received {self._first_received(self._received)}")
        for clock, deadline, reason in self._limits:
            # The next chance is a step away.
            if clock() + self._step_seconds + SAVES_BEFORE_DEADLINE * state.save_seconds >= deadline:
                return Decision(Wish.PREEMPT, reason)
        for file in self._files:
            if file.exists():
                if file.name == PRUNE_FILE:  # left for the sweep to remove
                    return Decision(Wish.PRUNE, file.read_text())
                file.unlink(missing_ok=True)
                stop = file.name == STOP_FILE
                return Decision(Wish.PREEMPT, STOP_REASON) if stop else Decision(Wish.SAVE)
        return CONTINUE

    def _first_received(self, name: str) -> str:
        """What the user or the scheduler sent, where the launching process handed it on."""
        try:
            return self._handed_on.read_text() if name == "SIGTERM" else name
        except OSError:
            return name
