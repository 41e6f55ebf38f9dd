"""The callbacks of a run as one object: each hook calls the hook of every callback, in their order."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any

import numpy as np

from dstune.config.callbacks import KEY, chosen_callbacks
from dstune.core.errors import Problem, UserError
from dstune.protocols import CALLBACKS
from dstune.protocols.callback import LEAVE, Action, Callback, Request, merge
from dstune.trainer.state import TrainState

if TYPE_CHECKING:
    from dstune.trainer.loop import FinishedEvaluation, Step, Training


SCALARS = {bool, float, int, str}


class CallbackList:
    def __init__(self, callbacks: Iterable[Callback]):
        self._callbacks = sorted(callbacks, key=lambda callback: callback.order)
        self._initial = self.state_dict()

    @classmethod
    def for_run(cls, run: Training) -> CallbackList:
        """Make the built-in callbacks that `run` needs and those of `trainer.callbacks`, load their states from its checkpoint,
        and register the callbacks that change gradients."""
        automatic = [member.for_run(run) for member in CALLBACKS.classes().values()]
        callbacks = cls([*(callback for callback in automatic if callback is not None), *chosen_callbacks(run.config)])
        callbacks.load(run.state)
        for callback in callbacks._callbacks:
            if callback.changes_gradients:
                run.engine.before_update(callback.before_update)
        return callbacks

    def __iter__(self) -> Iterator[Callback]:
        return iter(self._callbacks)

    # -- hooks --------------------------------------------------------------------------------------------------------

    def on_train_begin(self, run: Training) -> None:
        for callback in self._callbacks:
            callback.on_train_begin(run)

    def on_step_begin(self, run: Training, step: Step) -> None:
        for callback in self._callbacks:
            callback.on_step_begin(run, step)

    def on_micro_batch_begin(self, run: Training, step: Step, position: int, batch: Mapping[str, Any]) -> None:
        for callback in self._callbacks:
            callback.on_micro_batch_begin(run, step, position, batch)

    def on_micro_batch_end(self, run: Training, step: Step, position: int) -> None:
        for callback in self._callbacks:
            callback.on_micro_batch_end(run, step, position)

    @property
    def needs_loss_at_step_end(self) -> bool:
        return any(callback.needs_loss_at_step_end for callback in self._callbacks)

    def on_step_end(self, run: Training, step: Step) -> Request:
        return merge([_checked(callback, callback.on_step_end(run, step)) for callback in self._callbacks])

    def on_step_agreed(self, run: Training, step: Step) -> None:
        """Merge the requests of the callbacks into `step.request`."""
        for callback in self._callbacks:
            step.request = merge([step.request, _checked(callback, callback.on_step_agreed(run, step))])

    def between_steps(self, run: Training) -> None:
        for callback in self._callbacks:
            callback.between_steps(run)

    def while_waiting(self, run: Training) -> Request:
        return merge(
            [
                _checked(callback, callback.while_waiting(run), Action.EVALUATE | Action.REWIND)
                for callback in self._callbacks
            ]
        )

    def on_evaluate(self, run: Training, evaluation: FinishedEvaluation) -> Request:
        requests = [
            _checked(callback, callback.on_evaluate(run, evaluation), Action.EVALUATE | Action.REWIND)
            for callback in self._callbacks
        ]
        return merge(requests)

    def on_save(self, run: Training) -> None:
        for callback in self._callbacks:
            callback.on_save(run)

    def on_rewind(self, run: Training, earlier: TrainState | None) -> None:
        for callback in self._callbacks:
            saved = None
            if earlier is not None:
                # If the callback joined the run after this checkpoint was written, it goes back to its initial state.
                saved = earlier.callbacks.get(callback.name, self._initial.get(callback.name, {}))
            callback.on_rewind(run, saved)

    def on_train_end(self, run: Training, request: Request) -> None:
        for callback in self._callbacks:
            callback.on_train_end(run, request)

    def close(self) -> None:
        for callback in self._callbacks:
            callback.close()

    def on_progress(self, activity: str) -> None:
        for callback in self._callbacks:
            callback.on_progress(activity)

    @contextmanager
    def around(self, phase: str) -> Iterator[None]:
        with ExitStack() as stack:
            for callback in self._callbacks:
                stack.enter_context(_of_type(AbstractContextManager, callback, "around", callback.around(phase)))
            yield

    # -- vetoes -------------------------------------------------------------------------------------------------------

    @property
    def can_veto(self) -> bool:
        return any(callback.can_veto for callback in self._callbacks)

    def veto(self, run: Training, loss: float) -> bool:
        # A list, not a generator: every callback sees every step.
        vetoes = [callback.veto(run, loss) for callback in self._callbacks if callback.can_veto]
        return any(vetoes)

    # -- numbers and reports ------------------------------------------------------------------------------------------

    def numbers(self) -> list[Mapping[str, float]]:
        """Return the `numbers` of each callback."""
        return [_of_type(Mapping, callback, "numbers", callback.numbers()) for callback in self._callbacks]

    def agreed(self, run: Training, local_numbers: list[Mapping[str, float]], gathered: np.ndarray) -> None:
        """Give each callback its numbers from all ranks.

        local_numbers: the result of `numbers` on this rank. gathered: its values in that order, [ranks, numbers].
        """
        columns = iter(gathered.T.tolist())
        for callback, numbers in zip(self._callbacks, local_numbers, strict=True):
            if numbers:
                callback.agreed(run, {name: next(columns) for name in numbers})

    def metrics(self, run: Training, step: Step, taken: Iterable[str]) -> dict[str, float | int | str]:
        """Return the metrics of all callbacks. taken: the names that the loop itself uses.

        Raises:
            UserError: two metrics have the same name, so that one would hide the other; or a value is not JSON.
        """
        metrics: dict[str, float | int | str] = {}
        owners = dict.fromkeys(taken, "the training loop")
        for callback in self._callbacks:
            returned = _of_type(Mapping, callback, "metrics", callback.metrics(run, step))
            for name in filter(owners.get, returned):
                reason = f"the callback {callback.name} returned the metric {name}, which {owners[name]} already writes"
                raise UserError(Problem(KEY, reason, f"rename it, for example to {callback.name}/{name}"))
            if not {type(value) for value in returned.values()} <= SCALARS and (
                problem := _not_json(returned, numpy=True)
            ):
                reason = f"metrics() of the callback {callback.name} {problem}"
                raise UserError(Problem(KEY, reason, "return numbers and texts, for example float(x)"))
            owners |= dict.fromkeys(returned, f"the callback {callback.name}")
            metrics |= returned
        return metrics

    def results(self, taken: Collection[str], warn: Callable[[str], None]) -> dict[str, Any]:
        """Return the results of all callbacks. taken: the names that `result.json` already uses.

        An entry that `result.json` cannot hold is left out with a warning: training is done by now, and losing the entry is
        better than failing the run.
        """
        results: dict[str, Any] = {}
        for callback in self._callbacks:
            returned: Any = callback.results()
            if not isinstance(returned, Mapping):
                warn(
                    f"warning: results() of the callback {callback.name} returned {type(returned).__name__}, which is ignored"
                )
                continue
            for name, value in returned.items():
                is_taken = name in taken or name in results
                problem = "has the name of another entry" if is_taken else _not_json({name: value}, numpy=True)
                if problem:
                    warn(f"warning: result.json leaves out {name!r} of the callback {callback.name}: it {problem}")
                else:
                    results[name] = value
        return results

    # -- state --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Return the states of the callbacks that have one, by name. Raises UserError for a state that no checkpoint can hold."""
        states = {callback.name: state for callback in self._callbacks if (state := callback.state_dict())}
        for name, state in states.items():
            if problem := _not_json(state):
                fix = "return JSON's types from state_dict: float(x) for a number, list(x) for a set"
                raise UserError(Problem(KEY, f"the state of {name} {problem}", fix))
        return states

    def load(self, state: TrainState) -> None:
        """Load the state of each callback. Raises UserError for the state of an unknown callback: the next save would lose it."""
        names = {callback.name for callback in self._callbacks}
        if unknown := sorted(name for name in state.callbacks if name not in names and name not in CALLBACKS):
            reason = f"the checkpoint has the state of {', '.join(unknown)}, but the run has no callback of that name"
            raise UserError(
                Problem(KEY, reason, "add its plugin to `plugins` again, or start another run with run.dir")
            )
        for callback in self._callbacks:
            if callback.name in state.callbacks:
                callback.load_state_dict(state.callbacks[callback.name])


def _checked(callback: Callback, request: Any, ignored: Action = Action.CONTINUE) -> Request:
    """Return the request of `callback`, checked. None counts as an empty request, since hooks of other trainers return nothing. A
    request to stop gets a default reason, since a run without one would count as completed.

    Raises:
        UserError: the hook returned something else, or asks for an action that would be `ignored` at this moment.
    """
    if request is None:
        return Request()
    if not isinstance(request, Request):
        reason = f"a hook of the callback {callback.name} returned {type(request).__name__} instead of a Request"
        raise UserError(Problem(KEY, reason, "end the hook with `return dstune.Request()`"))
    if wrong := request.action & ignored:
        names = " and ".join(str(action.name) for action in Action if action & wrong)
        reason = f"the callback {callback.name} asks for {names} in a hook that does not follow a step"
        raise UserError(Problem(KEY, reason, "ask for it in on_step_agreed"))
    if request.action & (Action.STOP | LEAVE) and not request.reason:
        return Request(request.action, f"the callback {callback.name} asked for it")
    return request


def _of_type(kind: type, callback: Callback, hook: str, returned: Any) -> Any:
    """Return `returned`, which has to be a `kind`. Raises UserError if the hook of `callback` returned something else."""
    if isinstance(returned, kind):
        return returned
    wrong, right = type(returned).__name__, kind.__name__.removeprefix("Abstract")
    reason = f"{hook}() of the callback {callback.name} returned {wrong} instead of a {right}"
    raise UserError(Problem(KEY, reason, f"return super().{hook}(...) where there is nothing to return"))


def _not_json(value: Any, *, numpy: bool = False) -> str:
    """Return why `value` is not JSON; empty if it is. numpy: accept scalars of numpy and torch, which `tracking.jsonl.plain`
    converts."""

    def refuse(part: Any) -> Any:
        with suppress(ValueError, RuntimeError):  # more than one number
            if numpy and hasattr(part, "item"):
                return part.item()
        raise TypeError(f"holds a {type(part).__name__}, which JSON cannot represent")

    try:
        json.dumps(value, default=refuse)
    except (TypeError, ValueError, RecursionError) as error:
        return str(error) if str(error).startswith("holds") else f"is not JSON: {error}"
    return ""
