"""Defines a callback: an observer of the training loop with saved state, which can also veto a step or change a gradient.

A callback observes the run in its hooks, stores its data in its own fields, and asks for actions by returning a `Request`. It never
acts on the run itself: ranks may observe different things, so the loop first merges the requests of all callbacks on all ranks.
Modules of callbacks must import torch inside functions, since the launcher imports them to read their names.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from enum import IntFlag
from types import FunctionType
from typing import Any, ClassVar, Protocol


class Action(IntFlag):
    """Actions that a callback can ask for; those of several callbacks and ranks are combined."""

    CONTINUE = 0
    EVALUATE = 1
    SAVE = 2
    STOP = 4
    """End the run as planned: evaluate, save, export."""
    PREEMPT = 8
    """Save and end this launch; the run can be resumed."""
    FAIL = 16
    """End without saving, since the weights cannot be trusted."""
    PRUNE = 32
    """End without saving: the sweep of which the run is a trial needs no more of it."""
    REWIND = 64
    """Go back to the newest checkpoint and skip the data after it. Only `on_step_agreed` may ask for this, in a run with
    `trainer.spike.action=rollback`."""


UNSAVED = Action.FAIL | Action.PRUNE
LEAVE = Action.PREEMPT | UNSAVED
"""Actions that end the run at once, without evaluation or export."""


@dataclass(frozen=True)
class Request:
    action: Action = Action.CONTINUE
    reason: str = ""
    """The reason for STOP, PREEMPT, FAIL or PRUNE, for the console and `result.json`."""


CONTINUE = Request()


def merge(requests: Sequence[Request]) -> Request:
    """Combine requests into one with all their actions and reasons."""
    action = Action.CONTINUE
    for request in requests:
        action |= request.action
    return Request(action, "; ".join(request.reason for request in requests if request.reason))


class Log(Protocol):
    """The log to which rank 0 reports; other ranks have none."""

    def log(self, step: int, metrics: Mapping[str, float | int | str], rows: int | None = None) -> None: ...
    def progress(self, step: int, total_steps: int, metrics: Mapping[str, float | int | str]) -> None: ...
    def message(self, text: str) -> None: ...
    def rewind(self, step: int) -> None: ...


class Run(Protocol):
    """The training as hooks see it."""

    @property
    def config(self) -> Any: ...
    @property
    def state(self) -> Any:
        """The progress of the run: `step`, `tokens`, `best`, ..."""

    @property
    def total_steps(self) -> int: ...
    @property
    def world(self) -> Any:
        """This rank's place among all ranks: `rank`, `size`, `is_main`."""

    @property
    def engine(self) -> Any:
        """The DeepSpeed engine's wrapper, with the `module` in training."""

    @property
    def log(self) -> Log | None: ...
    def around(self, phase: str) -> AbstractContextManager[Any]:
        """Wrap a long phase in the `around` of all callbacks."""


class Step(Protocol):
    """One optimizer step: the micro-batches whose gradients are summed before an update."""

    number: int
    """Number of the step from 1 on, over all launches."""
    number_in_launch: int
    """Number of the step within this launch, from 0 on."""
    timed: bool
    """Whether its time counts for throughput. A callback that slows the step down sets this to False in `on_step_begin`."""
    seconds: float
    """Duration of the step; available from `on_step_agreed` on."""
    request: Request
    """The combined requests of all ranks so far; available from `on_step_agreed` on."""

    @property
    def epoch(self) -> float:
        """Passes over the training rows up to the end of this step, as a fraction."""

    @property
    def weight(self) -> float:
        """Number of targets in its global batch."""

    @property
    def loss_sum(self) -> float:
        """Sum of losses over the global batch; available from `on_step_end` on (`Callback.needs_loss_at_step_end`)."""

    @property
    def loss(self) -> float:
        """`loss_sum / weight`, as in metrics.jsonl; the same on every rank."""

    @property
    def update(self) -> Any:
        """The optimizer's report: `grad_norm`, `applied`, `loss_scale`, `vetoed`; available from `on_step_end` on."""


class Evaluation(Protocol):
    """The metrics of the validation rows."""

    metrics: dict[str, float]
    seconds: float
    row: dict[str, float]
    """The metrics for metrics.jsonl by name; a callback may add `eval/NAME`."""
    missing: frozenset[str]
    """Names of metrics that this evaluation could not measure, and that another may."""


HOOK_PREFIXES = ("on_", "before_", "after_", "between_", "while_")
HOOK_KINDS = (FunctionType, staticmethod, classmethod)
CLOSE = 0.83
"""Similarity from which a name counts as a misspelled hook: `step_end` (0.84 to `on_step_end`) does, `evaluated` (0.80) does
not."""


class Callback:
    """Base of every callback. Subclasses set `name`, override what they need, and register with `@dstune.callback`.

    `trainer.callbacks.NAME` sets the arguments of `__init__`.
    """

    name: ClassVar[str] = ""
    order: ClassVar[int] = 100
    """Callbacks with lower values are called first; built-ins have 10 to 90."""

    @classmethod
    def for_run(cls, run: Any) -> Callback | None:
        """Return the callback for a run that does not name it in `trainer.callbacks`, or None (the default). For built-ins.

        run: the `Training`, before any hook is called.
        """
        return None

    @classmethod
    def is_automatic(cls) -> bool:
        """Return whether runs use this callback without naming it."""
        return next(base for base in cls.__mro__ if "for_run" in vars(base)) is not Callback

    def __init_subclass__(cls, **keywords: Any) -> None:
        """Raise ValueError for a public method whose name starts like a hook's, or almost is one: it would never be called."""
        super().__init_subclass__(**keywords)
        names = [name for name in dir(Callback) if not name.startswith("_")]
        for name, member in vars(cls).items():
            if (
                name.startswith("_")
                or not isinstance(member, HOOK_KINDS)
                or any(hasattr(base, name) for base in cls.__mro__[1:])
            ):
                continue
            similar = difflib.get_close_matches(name, names, n=1, cutoff=CLOSE)
            if similar or name.startswith(HOOK_PREFIXES):
                near = similar or difflib.get_close_matches(name, names, n=1, cutoff=0.0)
                meant = f"did you mean {near[0]}?"
                reason = f"{cls.__qualname__}.{name} is no hook of callbacks, so nothing would call it"
                raise ValueError(f"{reason}: {meant} A helper method begins with _: _{name}")

    # -- when something happens ---------------------------------------------------------------------------------------

    def on_train_begin(self, run: Run) -> None:
        """Called before the first step of this launch."""

    def on_step_begin(self, run: Run, step: Step) -> None:
        """Called when the rows of the step have been loaded."""

    def on_micro_batch_begin(self, run: Run, step: Step, position: int, batch: Mapping[str, Any]) -> None:
        """Called before the forward pass of a micro-batch. position: counts this rank's micro-batches from 0."""

    def on_micro_batch_end(self, run: Run, step: Step, position: int) -> None:
        """Called after the forward and backward pass of a micro-batch."""

    def on_step_end(self, run: Run, step: Step) -> Request:
        """Called after the update. Returns the request of this rank."""
        return CONTINUE

    @property
    def needs_loss_at_step_end(self) -> bool:
        """Whether `on_step_end` reads `step.loss`, which needs one more exchange between the ranks per step.

        Set this to False if it does not; `on_step_agreed` always has the loss.
        """
        return type(self).on_step_end is not Callback.on_step_end

    def on_step_agreed(self, run: Run, step: Step) -> Request:
        """Called after the ranks have exchanged numbers and requests. Must return the same on every rank."""
        return CONTINUE

    def between_steps(self, run: Run) -> None:
        """Called before the next step, after the last one was logged and, if requested, evaluated and saved. Its time is not part
        of a step."""

    def while_waiting(self, run: Run) -> Request:
        """Called repeatedly between two steps while any rank waits for rows of a stream. Returns the request of this rank."""
        return CONTINUE

    def on_evaluate(self, run: Run, evaluation: Evaluation) -> Request:
        return CONTINUE

    def on_save(self, run: Run) -> None:
        """Called when a checkpoint is written, or is being written in the background."""

    def on_rewind(self, run: Run, saved: Mapping[str, Any] | None) -> None:
        """Called when the run has gone back to a checkpoint. saved: this callback's state in it; None if there was no checkpoint
        yet."""
        if saved is not None:
            self.load_state_dict(saved)

    def on_train_end(self, run: Run, request: Request) -> None:
        """Called after the last step of this launch. request: why it is the last."""

    def close(self) -> None:
        """Called when the run has ended: after evaluation, saving and export, or after a failure."""

    def on_progress(self, doing: str) -> None:
        """Called before every piece of work. doing: its description, such as a micro-batch or a batch of an evaluation."""

    def around(self, phase: str) -> AbstractContextManager[Any]:
        """Wrap work between steps that may take long: saving, going back, writing a profile."""
        return nullcontext()

    # -- steps and gradients ------------------------------------------------------------------------------------------

    @property
    def can_veto(self) -> bool:
        return type(self).veto is not Callback.veto

    def veto(self, run: Run, loss: float) -> bool:
        """Return whether to skip the update of this step. Called before its last backward pass; one rank's veto suffices.

        loss: the mean over the global batch.
        """
        return False

    @property
    def changes_gradients(self) -> bool:
        return type(self).before_update is not Callback.before_update

    def before_update(self, partition: Any, gradient: Any, group: dict[str, Any]) -> None:
        """Change `gradient` in place: the clipped gradient of the mean loss, a vector of the size of `partition.elements`, which
        this rank is about to update. Every trained entry occurs once over all ranks, at ZeRO stage 0 once on each rank.

        group: the optimizer's parameter group, with `lr` and `weight_decay`.
        """

    # -- numbers ------------------------------------------------------------------------------------------------------

    def numbers(self) -> Mapping[str, float]:
        """Return this rank's numbers for the exchange of a step, an evaluation or a wait. All ranks must use the same names."""
        return {}

    def agreed(self, run: Run, numbers: Mapping[str, Sequence[float]]) -> None:
        """Called with the `numbers` of all ranks, in rank order; every rank gets the same ones."""

    def metrics(self, run: Run, step: Step) -> Mapping[str, float | int | str]:
        """Return further values for the step's row of metrics.jsonl, under new names. Called on rank 0, after `on_step_agreed`."""
        return {}

    def results(self) -> Mapping[str, Any]:
        """Return entries for `result.json`, under new names; all others are dropped with a warning."""
        return {}

    # -- state --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint, in types that JSON knows (no numpy numbers). Must be the same on every rank."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state of a `state_dict`. Called before any hook, unless the run is new."""
