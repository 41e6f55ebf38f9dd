"""The callbacks of a run as one: each hook calls that of all callbacks, in their order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from dstune.config.callbacks import chosen_callbacks
from dstune.core.errors import Problem, UserError
from dstune.protocols import CALLBACKS
from dstune.protocols.callback import LEAVE, Action, Callback, Request, merge
from dstune.trainer.state import TrainState

if TYPE_CHECKING:
    from dstune.trainer.loop import Evaluated, Step, Training


class CallbackList:
    def __init__(self, callbacks: Iterable[Callback]):
        self._callbacks = sorted(callbacks, key=lambda one: one.order)
        self._initial = self.state_dict()

    @classmethod
    def for_run(cls, run: Training) -> CallbackList:
        """The built-in callbacks that `run` needs and those of `trainer.callbacks`, with the states of its checkpoint. Changes
        of gradients are installed."""
        automatic = [member.for_run(run) for member in CALLBACKS.classes().values()]
        callbacks = cls([*(one for one in automatic if one is not None), *chosen_callbacks(run.config)])
        callbacks.load(run.state)
        for one in callbacks._callbacks:
            if one.changes_gradients:
                run.engine.before_update(one.before_update)
        return callbacks

    def __iter__(self) -> Iterator[Callback]:
        return iter(self._callbacks)

    # -- hooks --------------------------------------------------------------------------------------------------------

    def on_train_begin(self, run: Training) -> None:
        for one in self._callbacks:
            one.on_train_begin(run)

    def on_step_begin(self, run: Training, step: Step) -> None:
        for one in self._callbacks:
            one.on_step_begin(run, step)

    def on_micro_batch_begin(self, run: Training, step: Step, position: int, batch: Mapping[str, Any]) -> None:
        for one in self._callbacks:
            one.on_micro_batch_begin(run, step, position, batch)

    def on_micro_batch_end(self, run: Training, step: Step, position: int) -> None:
        for one in self._callbacks:
            one.on_micro_batch_end(run, step, position)

    def on_step_end(self, run: Training, step: Step) -> Request:
        return merge([_checked(one, one.on_step_end(run, step)) for one in self._callbacks])

    def on_step_agreed(self, run: Training, step: Step) -> None:
        """What they ask for is added to `step.request`."""
        for one in self._callbacks:
            step.request = merge([step.request, _checked(one, one.on_step_agreed(run, step))])

    def between_steps(self, run: Training) -> None:
        for one in self._callbacks:
            one.between_steps(run)

    def while_waiting(self, run: Training) -> Request:
        return merge(
            [_checked(one, one.while_waiting(run), Action.EVALUATE | Action.REWIND) for one in self._callbacks]
        )

    def on_evaluate(self, run: Training, evaluation: Evaluated) -> Request:
        requests = [
            _checked(one, one.on_evaluate(run, evaluation), Action.EVALUATE | Action.REWIND) for one in self._callbacks
        ]
        return merge(requests)

    def on_save(self, run: Training) -> None:
        for one in self._callbacks:
            one.on_save(run)

    def on_rewind(self, run: Training, earlier: TrainState | None) -> None:
        for one in self._callbacks:
            # A checkpoint may be older than the callback's part in the run.
            saved = None if earlier is None else earlier.callbacks.get(one.name, self._initial.get(one.name, {}))
            one.on_rewind(run, saved)

    def on_train_end(self, run: Training, request: Request) -> None:
        for one in self._callbacks:
            one.on_train_end(run, request)

    def close(self) -> None:
        for one in self._callbacks:
            one.close()

    def on_progress(self, doing: str) -> None:
        for one in self._callbacks:
            one.on_progress(doing)

    @contextmanager
    def around(self, phase: str) -> Iterator[None]:
        with ExitStack() as stack:
            for one in self._callbacks:
                stack.enter_context(one.around(phase))
            yield

    # -- vetoes -------------------------------------------------------------------------------------------------------

    @property
    def can_veto(self) -> bool:
        return any(one.can_veto for one in self._callbacks)

    def veto(self, run: Training, loss: float) -> bool:
        vetoes = [one.veto(run, loss) for one in self._callbacks if one.can_veto]  # each sees every step
        return any(vetoes)

    # -- numbers and reports ------------------------------------------------------------------------------------------

    def numbers(self) -> list[Mapping[str, float]]:
        """Of each callback."""
        return [one.numbers() for one in self._callbacks]

    def agreed(self, run: Training, mine: list[Mapping[str, float]], everyone: np.ndarray) -> None:
        """mine: what `numbers` returned. everyone: its values one after another, [ranks, numbers]."""
        columns = iter(everyone.T.tolist())
        for one, numbers in zip(self._callbacks, mine, strict=True):
            if numbers:
                one.agreed(run, {name: next(columns) for name in numbers})

    def metrics(self, run: Training, step: Step) -> dict[str, float | int | str]:
        return {name: value for one in self._callbacks for name, value in one.metrics(run, step).items()}

    def results(self) -> dict[str, Any]:
        return {name: value for one in self._callbacks for name, value in one.results().items()}

    # -- state --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Of those that have one, by name."""
        return {one.name: state for one in self._callbacks if (state := one.state_dict())}

    def load(self, state: TrainState) -> None:
        """Raises UserError for the state of a callback that nobody knows: it would be lost with the next save."""
        own = {one.name for one in self._callbacks}
        if unknown := sorted(name for name in state.callbacks if name not in own and name not in CALLBACKS):
            reason = f"the checkpoint has the state of {', '.join(unknown)}, and no callback has such a name"
            raise UserError(
                Problem("trainer.callbacks", reason, "add it to plugins again, or start another run with run.dir")
            )
        for one in self._callbacks:
            if one.name in state.callbacks:
                one.load_state_dict(state.callbacks[one.name])


def _checked(one: Callback, request: Any, ignored: Action = Action.CONTINUE) -> Request:
    """What `one` asks for. An end has a reason, without which the run would count as completed.

    Raises:
        UserError: no request, or one for what is `ignored` at this moment.
    """
    if not isinstance(request, Request):
        reason = f"the callback {one.name} returned {type(request).__name__} where it asks for something"
        raise UserError(Problem("trainer.callbacks", reason, "end the hook with `return dstune.Request()`"))
    if wrong := request.action & ignored:
        names = " and ".join(str(action.name) for action in Action if action & wrong)
        reason = f"the callback {one.name} asks for {names} where there is no step to do it after"
        raise UserError(Problem("trainer.callbacks", reason, "ask for it in on_step_agreed"))
    if request.action & (Action.STOP | LEAVE) and not request.reason:
        return Request(request.action, f"the callback {one.name} asked for it")
    return request
