"""`state.json`: what older versions wrote is upgraded, and nothing unknown is dropped."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from support.configs import run_config

from dstune.core.errors import UserError
from dstune.protocols.callback import Action, Callback, Request
from dstune.rank.finalize import status_of
from dstune.trainer.callback_list import CallbackList
from dstune.trainer.callbacks.early_stopping import EarlyStopping
from dstune.trainer.callbacks.nonfinite import NonFinite
from dstune.trainer.callbacks.overfitting import Overfitting
from dstune.trainer.callbacks.spikes import Spikes
from dstune.trainer.loop import rewind_if_requested
from dstune.trainer.state import FORMAT, Best, TrainState, upgrade_state

FORMAT_1 = {
    "step": 7,
    "planned_steps": 9,
    "skipped_windows": 2,
    "tokens": 4000,
    "targets": 3000.0,
    "nonfinite_steps": 3,
    "overflow_steps": 4,
    "seconds": 12.5,
    "timed_tokens": 2000,
    "timed_seconds": 5.0,
    "timed_flops": 3e9,
    "timed_capacity": 4e9,
    "save_seconds": 0.5,
    "peak_memory_gib": 1.25,
    "best": {"metric": "loss", "value": 1.5, "step": 3},
    "evaluations_without_gain": 1,
    "evaluation_due": True,
    "eval_initial": {"loss": 3.0},
    "eval_last": {"loss": 1.6},
    "eval_last_step": 6,
    "fit_loss_sum": 10.0,
    "fit_weight": 6.0,
    "cursor": {"block": 1},
    "extra": {
        "spikes": {"losses": [1.0, 2.0], "events": [{"step": 2, "action": "skipped"}]},
        "overfitting": {"gap": 0.1},
        "micro_batch": {"rows": 4},
    },
}
"""As the version before callbacks wrote it."""


def test_fields_of_format_1_go_to_the_callbacks_that_took_them_over():
    saved = {"step": 7, "precision": "fp32", "train": FORMAT_1}
    upgraded = upgrade_state(saved)
    assert upgraded["format"] == FORMAT and upgraded["precision"] == "fp32"
    state = TrainState.from_dict(upgraded["train"])
    assert (state.step, state.left_out_batches, state.next_batch) == (7, 2, 9)
    assert state.best == Best("loss", 1.5, 3) and state.evaluation_due and state.cursor == {"block": 1}
    assert state.results == {"overfitting": {"gap": 0.1}, "micro_batch": {"rows": 4}}
    assert state.callbacks == {
        "nonfinite": {"nonfinite_steps": 3, "overflow_steps": 4},
        "throughput": {"tokens": 2000, "seconds": 5.0, "flops": 3e9, "capacity": 4e9},
        "memory": {"peak_memory_gib": 1.25},
        "early_stopping": {"evaluations_without_gain": 1},
        "overfitting": {"loss_sum": 10.0, "weight": 6.0},
        "spikes": {"losses": [1.0, 2.0], "events": [{"step": 2, "action": "skipped"}]},
    }
    made = [cls(run_config()) for cls in (NonFinite, EarlyStopping, Overfitting, Spikes)]
    for one in made:
        one.load_state_dict(state.callbacks[one.name])
    assert {one.name: one.state_dict() for one in made}.items() <= state.callbacks.items()
    assert upgrade_state(upgraded) == upgraded
    assert TrainState.from_dict(state.to_dict()) == state


def test_a_field_that_came_later_is_what_it_was_before():
    older = {name: value for name, value in FORMAT_1.items() if not name.startswith("timed_f")}
    throughput = upgrade_state({"train": older})["train"]["callbacks"]["throughput"]
    assert throughput == {"tokens": 2000, "seconds": 5.0, "flops": 0, "capacity": 4e9}


@pytest.mark.parametrize(
    ("saved", "words"),
    [
        ({"train": FORMAT_1 | {"moments": 3}}, "does not know: moments"),
        ({"train": FORMAT_1 | {"left_out_batches": 3}}, "does not know: left_out_batches"),
        ({"format": FORMAT + 1, "train": {}}, f"has format {FORMAT + 1}"),
        ({"format": FORMAT, "train": {"step": 1, "skipped_windows": 2}}, "does not know: skipped_windows"),
    ],
)
def test_what_is_unknown_is_refused(saved, words):
    with pytest.raises(UserError, match=words):
        TrainState.from_dict(upgrade_state(saved)["train"])


class Counter(Callback):
    name = "cadence"  # one that is known
    steps = 0

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state):
        self.steps = state["steps"]


def test_the_state_of_a_callback_that_nobody_knows_is_refused():
    callbacks = CallbackList([Counter()])
    callbacks.load(TrainState(callbacks={"cadence": {"steps": 3}}))
    assert callbacks.state_dict() == {"cadence": {"steps": 3}}
    with pytest.raises(UserError, match="has the state of gone"):
        callbacks.load(TrainState(callbacks={"gone": {}}))


def test_an_end_without_a_reason_is_no_completion():
    class Quiet(Callback):
        name = "quiet"

        def on_step_end(self, run, step):
            return Request(Action.STOP)

    request = CallbackList([Quiet()]).on_step_end(SimpleNamespace(), SimpleNamespace())
    assert request.reason == "the callback quiet asked for it"
    assert status_of(request) == "stopped"


def test_going_back_is_refused_where_nothing_is_prepared_for_it():
    """The data of such a run would end before its last step."""
    run = SimpleNamespace(config=run_config(), unwritten=None)
    with pytest.raises(UserError, match=r"trainer\.spike\.action=rollback"):
        rewind_if_requested(run, Request(Action.REWIND))


@pytest.mark.parametrize("action", [Action.EVALUATE, Action.REWIND])
def test_what_nobody_would_do_after_an_evaluation_is_refused(action):
    class Late(Callback):
        name = "late"

        def on_evaluate(self, run, evaluation):
            return Request(action)

    with pytest.raises(UserError, match=f"the callback late asks for {action.name} in a hook"):
        CallbackList([Late()]).on_evaluate(SimpleNamespace(), SimpleNamespace())


def test_a_hook_that_returns_nothing_asks_for_nothing():
    class Silent(Callback):
        name = "silent"

        def on_evaluate(self, run, evaluation): ...

    assert CallbackList([Silent()]).on_evaluate(SimpleNamespace(), SimpleNamespace()) == Request()


def test_a_hook_that_returns_something_else_is_named():
    class Mistaken(Callback):
        name = "mistaken"

        def on_evaluate(self, run, evaluation):
            return True

    with pytest.raises(UserError, match="the callback mistaken returned bool"):
        CallbackList([Mistaken()]).on_evaluate(SimpleNamespace(), SimpleNamespace())


def callback(**hooks):
    """One named `mine` with hooks that return these values."""
    returning = {name: lambda self, *arguments, value=value: value for name, value in hooks.items()}
    return type("Mine", (Callback,), {"name": "mine", **returning})()


STEP = SimpleNamespace(), SimpleNamespace()


@pytest.mark.parametrize(
    ("hook", "call"),
    [
        ("metrics", lambda callbacks: callbacks.metrics(*STEP, ())),
        ("numbers", CallbackList.numbers),
        ("around", lambda callbacks: callbacks.around("saving").__enter__()),
    ],
)
def test_a_hook_that_returns_nothing_is_named(hook, call):
    with pytest.raises(UserError, match=rf"{hook}\(\) of the callback mine returned NoneType"):
        call(CallbackList([callback(**{hook: None})]))


def test_a_metric_hides_no_other():
    class Other(Callback):
        name = "other"

        def metrics(self, run, step):
            return {"gain": 1.0}

    both = [callback(metrics={"gain": np.float32(0.5)}), Other()]
    assert CallbackList(both[:1]).metrics(*STEP, ("loss", "lr")) == {"gain": 0.5}
    with pytest.raises(UserError, match="other returned the metric gain, which the callback mine already writes"):
        CallbackList(both).metrics(*STEP, ())
    with pytest.raises(UserError, match="mine returned the metric loss, which the training loop already writes"):
        CallbackList([callback(metrics={"loss": 99.0})]).metrics(*STEP, ("loss", "lr"))


def test_a_metric_that_is_not_json_names_its_callback():
    with pytest.raises(UserError, match="of the callback mine holds a PosixPath"):
        CallbackList([callback(metrics={"where": Path("x")})]).metrics(*STEP, ())


@pytest.mark.parametrize("value", [np.float32(1.5), {1, 2}])
def test_a_state_that_no_checkpoint_can_hold_is_refused_before_training(value):
    with pytest.raises(UserError, match=rf"trainer\.callbacks: the state of mine holds a {type(value).__name__}"):
        CallbackList([callback(state_dict={"a": value})])


def test_what_the_result_cannot_hold_is_left_out_with_a_warning():
    """The training is done, and has saved and exported its weights."""
    mine = callback(results={"status": "fine", "path": Path("x"), "mean": np.float32(0.5)})
    warnings: list[str] = []
    assert CallbackList([mine]).results({"status", "steps"}, warnings.append) == {"mean": 0.5}
    assert ["'status' of the callback mine" in warnings[0], "holds a PosixPath" in warnings[1]] == [True, True]
    assert CallbackList([callback(results=None)]).results((), warnings.append) == {}
    assert "mine returned NoneType" in warnings[2]


def test_going_back_gives_callbacks_their_earlier_state():
    callbacks, run = CallbackList([one := Counter()]), SimpleNamespace()
    one.steps = 5
    callbacks.on_rewind(run, TrainState(callbacks={"cadence": {"steps": 2}}))
    assert one.steps == 2
    callbacks.on_rewind(run, TrainState())  # a checkpoint from before the callback: as it began
    assert one.steps == 0
    one.steps = 4
    callbacks.on_rewind(run, None)  # there was no checkpoint
    assert one.steps == 4
