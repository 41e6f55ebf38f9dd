"""What a callback is: an observer of the training loop with saved state, which may also veto a step or change a gradient.

A callback sees the run in its hooks, keeps what it needs in its own fields, and asks for things by returning a `Request`. It
never acts on the run itself: ranks may see different things, so the loop merges the requests of all callbacks on all ranks
before it acts. Modules of callbacks import torch inside functions only, since the launcher reads their names.
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
    """What a callback may ask for; requests of several callbacks and ranks add up."""

    CONTINUE = 0
    EVALUATE = 1
    SAVE = 2
    STOP = 4
    """End the run as planned: evaluate, save, export."""
    PREEMPT = 8
    """Save and leave, to be continued."""
    FAIL = 16
    """Leave without a save: the weights cannot be trusted."""
    PRUNE = 32
    """Leave without a save: the sweep that the run is a trial of has seen enough."""
    REWIND = 64
    """Go back to the newest checkpoint and leave out the data since; may be asked for by `on_step_agreed` only, in a run with
    `trainer.spike.action=rollback`."""


UNSAVED = Action.FAIL | Action.PRUNE
LEAVE = Action.PREEMPT | UNSAVED
"""Leave at once: nothing is evaluated or exported."""


@dataclass(frozen=True)
class Request:
    action: Action = Action.CONTINUE
    reason: str = ""
    """For the console and `result.json`, with STOP, PREEMPT, FAIL and PRUNE."""


CONTINUE = Request()


def merge(requests: Sequence[Request]) -> Request:
    """Join requests: all actions that any of them asks for, and all reasons."""
    action = Action.CONTINUE
    for request in requests:
        action |= request.action
    return Request(action, "; ".join(request.reason for request in requests if request.reason))


class Log(Protocol):
    """Where rank 0 reports; the other ranks have none."""

    def log(self, step: int, metrics: Mapping[str, float | int | str], rows: int | None = None) -> None: ...
    def progress(self, step: int, total_steps: int, metrics: Mapping[str, float | int | str]) -> None: ...
    def message(self, text: str) -> None: ...
    def rewind(self, step: int) -> None: ...


class Run(Protocol):
    """What hooks see of the training."""

    @property
    def config(self) -> Any: ...
    @property
    def state(self) -> Any:
        """Where the run is: `step`, `tokens`, `best`, ..."""

    @property
    def total_steps(self) -> int: ...
    @property
    def world(self) -> Any:
        """This rank among the others: `rank`, `size`, `is_main`."""

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
    """Counts from 1, over all launches."""
    number_in_launch: int
    """Counts from 0."""
    timed: bool
    """Whether its time counts for throughput. A callback that makes the step slower sets it to False in `on_step_begin`."""
    seconds: float
    """From `on_step_agreed` on."""
    request: Request
    """What has been asked for so far, over all ranks; from `on_step_agreed` on."""

    @property
    def epoch(self) -> float:
        """Passes over the training rows that are done with it."""

    @property
    def weight(self) -> float:
        """Targets of its global batch."""

    @property
    def loss_sum(self) -> float:
        """Over the global batch; from `on_step_end` on (`Callback.needs_loss_at_step_end`)."""

    @property
    def loss(self) -> float:
        """`loss_sum / weight`: what metrics.jsonl has, on every rank."""

    @property
    def update(self) -> Any:
        """What the optimizer did: `grad_norm`, `applied`, `loss_scale`, `vetoed`; from `on_step_end` on."""


class Evaluation(Protocol):
    """The metrics of the validation rows."""

    metrics: dict[str, float]
    seconds: float
    row: dict[str, float]
    """Of metrics.jsonl; a callback may add `eval/NAME`."""


HOOK_PREFIXES = ("on_", "before_", "after_", "between_", "while_")
HOOK_KINDS = (FunctionType, staticmethod, classmethod)
CLOSE = 0.83
"""Similarity from which a name counts as a hook's misspelled: `step_end` (0.84 from `on_step_end`), not `evaluated` (0.80)."""


class Callback:
    """Base of every callback. Subclasses set `name`, override what they need, and register with `@dstune.callback`.

    The arguments of `__init__` are what `trainer.callbacks.NAME` sets.
    """

    name: ClassVar[str] = ""
    order: ClassVar[int] = 100
    """Hooks of a lower one are called first; built-ins have 10 to 90."""

    @classmethod
    def for_run(cls, run: Any) -> Callback | None:
        """Return the callback of a run that does not name it in `trainer.callbacks`; None, the default, for nothing. For built-ins.

        run: the `Training`, before any hook is called.
        """
        return None

    @classmethod
    def is_automatic(cls) -> bool:
        """Return whether runs have it without naming it."""
        return next(base for base in cls.__mro__ if "for_run" in vars(base)) is not Callback

    def __init_subclass__(cls, **keywords: Any) -> None:
        """Raise ValueError for a public method whose name begins like a hook's, or is nearly one: it would never be called."""
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
        """Called when the rows of the step are there."""

    def on_micro_batch_begin(self, run: Run, step: Step, position: int, batch: Mapping[str, Any]) -> None:
        """Called before the forward pass of a micro-batch. position: counts this rank's micro-batches from 0."""

    def on_micro_batch_end(self, run: Run, step: Step, position: int) -> None:
        """Called when forward and backward pass are done."""

    def on_step_end(self, run: Run, step: Step) -> Request:
        """Called when the update is done. Returns what this rank asks for."""
        return CONTINUE

    @property
    def needs_loss_at_step_end(self) -> bool:
        """Whether `on_step_end` reads `step.loss`, for which the ranks exchange numbers once more a step.

        An `on_step_end` that does not read it may say False; `on_step_agreed` has the loss in any case.
        """
        return type(self).on_step_end is not Callback.on_step_end

    def on_step_agreed(self, run: Run, step: Step) -> Request:
        """Called when the ranks have exchanged numbers and requests. Must return the same on every rank."""
        return CONTINUE

    def between_steps(self, run: Run) -> None:
        """Called when the step is logged, evaluated and saved where that was asked for, and another one comes. Counts as no
        step."""

    def while_waiting(self, run: Run) -> Request:
        """Called again and again between two steps while any rank waits for rows of a stream; returns what to do."""
        return CONTINUE

    def on_evaluate(self, run: Run, evaluation: Evaluation) -> Request:
        return CONTINUE

    def on_save(self, run: Run) -> None:
        """Called when a checkpoint is written, or is being written in the background."""

    def on_rewind(self, run: Run, saved: Mapping[str, Any] | None) -> None:
        """Called when the run went back to a checkpoint, with `saved` as this callback's state; None: there was no checkpoint
        yet."""
        if saved is not None:
            self.load_state_dict(saved)

    def on_train_end(self, run: Run, request: Request) -> None:
        """Called when the last step of this launch is over. request: why."""

    def close(self) -> None:
        """Called when the run is over, evaluated, saved and exported, or has failed."""

    def on_progress(self, doing: str) -> None:
        """Called before `doing`: a micro-batch, a batch of an evaluation, ..."""

    def around(self, phase: str) -> AbstractContextManager[Any]:
        """Wrap what has no steps and may take long: saving, going back, writing a profile."""
        return nullcontext()

    # -- steps and gradients ------------------------------------------------------------------------------------------

    @property
    def can_veto(self) -> bool:
        return type(self).veto is not Callback.veto

    def veto(self, run: Run, loss: float) -> bool:
        """Return whether to leave out the update of this step, asked before its last backward pass. Any rank may say so.

        loss: mean over the global batch.
        """
        return False

    @property
    def changes_gradients(self) -> bool:
        return type(self).before_update is not Callback.before_update

    def before_update(self, partition: Any, gradient: Any, group: dict[str, Any]) -> None:
        """Change `gradient` in place: the clipped gradient of the mean loss, a vector of the size of `partition.elements`,
        which this rank is about to update. Every trained entry comes once over all ranks, at ZeRO stage 0 once on each.

        group: the optimizer's, with `lr` and `weight_decay`.
        """

    # -- numbers ------------------------------------------------------------------------------------------------------

    def numbers(self) -> Mapping[str, float]:
        """Return numbers of this rank for the exchange of a step, an evaluation or a wait: the same names on all ranks."""
        return {}

    def agreed(self, run: Run, numbers: Mapping[str, Sequence[float]]) -> None:
        """Called with the `numbers` of all ranks, in rank order; the same on every rank."""

    def metrics(self, run: Run, step: Step) -> Mapping[str, float | int | str]:
        """Return further values for the row of the step in metrics.jsonl, under names that it lacks; called after
        `on_step_agreed`, on rank 0."""
        return {}

    def results(self) -> Mapping[str, Any]:
        """Return entries for `result.json`, under names that it lacks: anything else is left out with a warning."""
        return {}

    # -- state --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint has to remember, as JSON, which has no numbers of numpy. Must be the same on every rank."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`; called before any hook, unless the run is new."""
