"""Callbacks, metrics, the feed and seeds: the parts of the loop that need no model."""

from __future__ import annotations

import math
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.configs import run_config
from torch.utils.checkpoint import checkpoint

from dstune.config.schema import CheckpointConfig, EarlyStoppingConfig, EvaluateConfig, TrainerConfig
from dstune.config.validate import at_stage
from dstune.core.errors import DstuneError, Problem, TrainingFailed, UserError
from dstune.core.rank_env import hold_notices, take_notices
from dstune.data.sampler import GlobalBatch
from dstune.methods.ulmfit.config import UlmfitConfig
from dstune.metrics import improves
from dstune.metrics.language import language_model_metrics
from dstune.protocols.callback import CONTINUE, Action, Callback, Request
from dstune.rank import worker
from dstune.tasks.classification.config import ClassificationConfig
from dstune.tasks.classification.metrics import classification_metrics
from dstune.trainer import loop, step_timer
from dstune.trainer.callback_list import CallbackList
from dstune.trainer.callbacks.cadence import Cadence
from dstune.trainer.callbacks.early_stopping import EarlyStopping
from dstune.trainer.callbacks.nonfinite import NonFinite
from dstune.trainer.callbacks.preemption import Preemption
from dstune.trainer.callbacks.stragglers import OwnTime
from dstune.trainer.data_loader import StepBatch
from dstune.trainer.loop import UnwrittenRow, evaluate
from dstune.trainer.measure import Evaluation
from dstune.trainer.prefetcher import Prefetcher, dropout_seed, prefetched_steps
from dstune.trainer.state import Best, TrainState
from dstune.trainer.step_timer import StepTimer, StepTimes
from dstune.zero.engine import Update

FINE = Update(1.0, applied=True)
BROKEN = Update(math.nan, applied=False)


def at(step: int = 0, **state) -> SimpleNamespace:
    """A run after so many steps."""
    return SimpleNamespace(state=TrainState(step=step, **state), log=None)


def done(number: int, update: Update = FINE) -> SimpleNamespace:
    """A step that has updated."""
    return SimpleNamespace(number=number, update=update, epoch=number / 10)


def after_steps(callback: Callback, *updates: Update) -> list[Action]:
    return [callback.on_step_end(at(), done(number + 1, update)).action for number, update in enumerate(updates)]


def test_cadence():
    config = run_config(evaluate=EvaluateConfig(every=2), checkpoint=CheckpointConfig(every=3))
    hook = Cadence(config, 7, can_evaluate=True)
    actions = after_steps(hook, *[FINE] * 7)
    nothing, evaluate, save = Action.CONTINUE, Action.EVALUATE, Action.SAVE
    assert actions == [nothing, evaluate, save, evaluate, nothing, evaluate | save, evaluate]
    assert after_steps(Cadence(config, 2, can_evaluate=False), FINE, FINE) == [nothing, nothing]


def test_non_finite_steps_are_skipped_up_to_the_limit():
    hook = NonFinite(run_config(trainer=TrainerConfig(max_nonfinite_steps=2)))
    assert after_steps(hook, BROKEN, FINE, BROKEN) == [Action.CONTINUE] * 3
    last = hook.on_step_end(at(), done(4, BROKEN))
    assert last.action is Action.FAIL
    assert "trainer.max_nonfinite_steps=2" in last.reason
    assert hook.results() == {"nonfinite_steps": 3, "overflow_steps": 0}


def test_overflow_of_the_loss_scale_is_no_fault_until_the_scale_is_at_its_floor():
    hook = NonFinite(run_config(trainer=TrainerConfig(max_nonfinite_steps=0)))
    assert after_steps(hook, replace(BROKEN, loss_scale=4096.0)) == [Action.CONTINUE]
    assert hook.results() == {"nonfinite_steps": 0, "overflow_steps": 1}
    assert after_steps(hook, replace(BROKEN, loss_scale=1.0)) == [Action.FAIL]
    # zero.settings={fp16: {loss_scale: 128}} or {min_loss_scale: 128}
    hook = NonFinite(run_config(trainer=TrainerConfig(max_nonfinite_steps=0)))
    assert after_steps(hook, replace(BROKEN, loss_scale=128.0, lowest_loss_scale=128.0)) == [Action.FAIL]


def test_early_stopping_counts_evaluations_without_gain_and_keeps_the_best():
    settings = EarlyStoppingConfig(metric="loss", patience=2, min_delta=0.1)
    config, run, actions = run_config(trainer=TrainerConfig(early_stopping=settings)), at(), []
    saved: dict = EarlyStopping(config).state_dict()
    for step, loss in enumerate([3.0, 2.0, 1.95, 1.5, 1.45, 1.6]):
        run.state.step = step
        hook = EarlyStopping(config)  # each time a launch of its own
        hook.load_state_dict(saved)
        actions.append(hook.on_evaluate(run, SimpleNamespace(metrics={"loss": loss}, missing=frozenset())).action)
        saved = hook.state_dict()
    # No save of untrained weights; 1.95 is no gain of 0.1; 1.45 and 1.6 are the two in a row.
    go_on, save = Action.CONTINUE, Action.SAVE
    assert actions == [go_on, save, go_on, save, go_on, Action.STOP]
    assert run.state.best == Best("loss", 1.5, 3)


def test_early_stopping_on_losses_that_are_not_numbers():
    settings = EarlyStoppingConfig(metric="loss", patience=1)
    hook = EarlyStopping(run_config(trainer=TrainerConfig(early_stopping=settings)))
    request = hook.on_evaluate(at(1), SimpleNamespace(metrics={"loss": math.nan}, missing=frozenset()))
    assert request.action is Action.STOP
    assert "has not been finite" in request.reason


def test_a_metric_that_is_not_finite_is_reported_once():
    """`best` stays null in the result, and the reader has to know why."""
    config = run_config(trainer=TrainerConfig(early_stopping=EarlyStoppingConfig(metric="mine")))
    hook, messages = EarlyStopping(config), []
    for step in (1, 2):
        run = at(step)
        run.log = SimpleNamespace(message=messages.append)
        hook.on_evaluate(run, SimpleNamespace(metrics={"loss": 1.0, "mine": math.nan}, missing=frozenset()))
    (message,) = messages
    assert message.startswith("warning: mine is nan in the evaluation after step 1,")


@pytest.mark.parametrize(
    ("metric", "value", "best", "expected"),
    [
        ("loss", 1.0, 2.0, True),
        ("loss", 2.0, 2.0, False),
        ("accuracy", 0.9, 0.8, True),
        ("accuracy", 0.7, 0.8, False),
        ("loss", math.nan, None, False),
        ("loss", math.inf, None, False),
        ("f1_macro", 0.1, None, True),
    ],
)
def test_improves(metric, value, best, expected):
    assert improves(metric, value, best) is expected


def test_language_model_metrics():
    metrics = language_model_metrics(loss_sum=20.0, weight=10.0, correct=4.0)
    assert metrics == {"loss": 2.0, "perplexity": pytest.approx(math.e**2), "token_accuracy": 0.4, "targets": 10.0}


def test_classification_metrics_by_hand():
    # true    0 0 0 1 2     class 0: precision 2/2, recall 2/3 -> 0.8; class 1: 1/2, 1/1 -> 2/3; class 2: 0/1 -> 0; class 3: absent
    # guessed 0 0 1 1 3
    metrics, confusion = classification_metrics([0, 0, 1, 1, 3], [0, 0, 0, 1, 2], np.full((5, 4), 0.25))
    assert metrics["accuracy"] == pytest.approx(3 / 5)
    assert metrics["auroc"] == 0.5
    assert metrics["f1_macro"] == pytest.approx((0.8 + 2 / 3 + 0 + 0) / 4)
    assert confusion == [[2, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]]


class SecondRank:
    """What the callbacks of rank 1 ask for, of which rank 0 knows nothing."""

    request = Request(Action.STOP | Action.SAVE, "rank 1 has had enough")


class TwoRanks:
    """Rank 0's view of a world in which rank 1 asks for `SecondRank.request`."""

    def gather_numbers(self, numbers):
        return np.array([numbers, [float(SecondRank.request.action), *[0.0] * (len(numbers) - 1)]])

    def gather(self, value):
        return [value, SecondRank.request.reason]


def test_requests_after_an_evaluation_are_those_of_all_ranks():
    run = SimpleNamespace(
        data=SimpleNamespace(validation=SimpleNamespace(lengths=[8] * 3)),
        config=SimpleNamespace(evaluate=SimpleNamespace(max_rows=None)),
        state=TrainState(step=4),
        evaluator=lambda split, progress: Evaluation({"loss": 1.0}),
        log=None,
        unwritten=None,
        callbacks=CallbackList([Callback()]),  # nothing is asked for here
        world=TwoRanks(),
    )
    assert evaluate(run) == SecondRank.request


def test_the_step_timer_adds_up_what_lies_between_its_marks(monkeypatch):
    moments = iter([0.0, 9.0, 9.5, 10.0, 12.0, 15.0, 17.0, 20.0, 21.0, 22.0])
    monkeypatch.setattr(step_timer.time, "perf_counter", lambda: next(moments))
    times = StepTimer()
    times.start()
    assert times.rows_ready() == 0.5
    times.begin()
    for part in ("forward", "backward", "forward", "backward", "update"):
        times.mark(part)
    expected = {"data_seconds": 0.5, "forward_seconds": 4.0, "backward_seconds": 6.0, "update_seconds": 1.0}
    assert times.times().are_known and times.times().parts() == expected
    assert times.seconds() == 13.0


class Event:
    """Of a device that has not come to it until somebody waits."""

    def __init__(self, failure: str = ""):
        self.failure, self.over, self.waits = failure, False, 0

    def query(self) -> bool:
        return self.over

    def synchronize(self) -> None:
        if self.failure:
            raise RuntimeError(self.failure)
        self.waits += 1
        self.over = True

    def elapsed_time(self, end: Event) -> float:
        assert end.over
        return 2000.0


def unwritten(run, event: Event, step: int = 3) -> None:
    times = StepTimes(0.5, [("", event), ("update", event)], on_gpu=True)
    run.unwritten = UnwrittenRow(step, {"loss": 1.0}, {"more": 4.0}, times)


def logging_run(**given):
    rows: list[tuple[int, dict]] = []
    log = SimpleNamespace(
        log=lambda step, metrics, **unused: rows.append((step, metrics)),
        progress=lambda *unused: None,
        evaluating=lambda *unused: None,
    )
    return rows, SimpleNamespace(log=log, unwritten=None, total_steps=9, **given)


def test_a_row_whose_step_the_device_still_computes_is_written_before_whatever_comes_next(monkeypatch):
    rows, run = logging_run(
        data=SimpleNamespace(validation=SimpleNamespace(lengths=[8] * 3)),
        config=SimpleNamespace(evaluate=SimpleNamespace(max_rows=None)),
        state=TrainState(step=3),
        evaluator=lambda split, progress: Evaluation({"loss": 1.0}),
        world=TwoRanks(),
        saves=SimpleNamespace(save=lambda *unused, **more: False),
        around=lambda phase: nullcontext(),
        callbacks=CallbackList([Callback()]),
    )
    parts = {"data_seconds": 0.5, "forward_seconds": 0.0, "backward_seconds": 0.0, "update_seconds": 2.0}
    event = Event()
    unwritten(run, event)
    evaluate(run)
    assert [(step, list(row)) for step, row in rows] == [
        (3, ["loss", *parts, "more"]),
        (3, ["eval/loss", "eval/seconds"]),
    ]
    assert rows[0][1] == {"loss": 1.0, **parts, "more": 4.0} and event.waits == 1
    unwritten(run, Event(), 4)
    loop.save(run, now=False)
    assert rows[2][0] == 4

    monkeypatch.setattr(loop, "evaluate_before_training", lambda run: CONTINUE)
    monkeypatch.setattr(loop, "train", lambda run: unwritten(run, Event(), 5))
    loop.fit(run)
    assert rows[3][0] == 5 and run.unwritten is None

    def fail(event: Event) -> None:
        monkeypatch.setattr(loop, "train", lambda run: (unwritten(run, event, 6), 1 / 0))
        with pytest.raises(ZeroDivisionError):
            loop.fit(run)

    fail(Event())
    assert rows[4][0] == 6
    fail(Event("the device is lost"))  # says nothing of itself: the run has failed for another reason
    assert len(rows) == 5


def test_a_row_is_written_after_the_next_step(monkeypatch):
    """Nobody waits for it: by then the next step's norm was read."""
    rows, run = logging_run(config=None, callbacks=CallbackList([]), state=TrainState())
    monkeypatch.setattr(loop, "learning_rate", lambda run, step: 0.1)
    monkeypatch.setattr(loop, "task_of", lambda task: SimpleNamespace(measure_step=lambda totals: {}))
    run.config = SimpleNamespace(task=None)
    events, sums = [Event(), Event()], {"loss_sum": 1.0, "weight": 1.0, "correct": 0.0}
    for number, event in enumerate(events, start=1):
        times = StepTimes(0.0, [("", event), ("update", event)], on_gpu=True)
        run.step_timer = SimpleNamespace(times=lambda times=times: times)
        update = SimpleNamespace(grad_norm=1.0)
        step = SimpleNamespace(number=number, epoch=0.0, loss=2.0, update=update, seconds=1.0, sums=sums)
        loop.report_step(run, step)
        assert [row[0] for row in rows] == list(range(1, number)) and run.unwritten.step == number
        event.over = True
    assert [event.waits for event in events] == [0, 0]
    run.unwritten = None
    loop.report_step(run, step)  # of a device that is done, and of a CPU, at once
    assert rows[-1][0] == 2 and run.unwritten is None
    for name in ("loss", "lr", "step", "forward_seconds"):
        run.callbacks = CallbackList([one := Callback()])
        one.metrics = lambda run, step, name=name: {name: 7.0}
        with pytest.raises(UserError, match=f"the metric {name}, which the training loop"):
            loop.report_step(run, step)


def test_own_time_under_activation_checkpointing():
    """The second forward pass of a checkpoint ends before its last layer does."""
    layers = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh(), torch.nn.Linear(4, 4))
    own = OwnTime()
    own.attach(layers)
    own.start(8, waited=0.0)
    checkpoint(layers, torch.ones(2, 4, requires_grad=True), use_reentrant=False).sum().backward()
    own.stop()
    assert own.collect() > 0


def test_dropout_seeds_are_distinct():
    seeds = {dropout_seed(seed, step, index) for seed in range(4) for step in range(50) for index in range(50)}
    assert len(seeds) == 4 * 50 * 50
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_feed_keeps_the_order_and_raises_where_it_belongs():
    def prepare(step):
        if step == 3:
            raise ValueError("row 3")
        return step * 10

    feed = Prefetcher(prepare, range(6))
    assert [next(feed) for _ in range(3)] == [0, 10, 20]
    with pytest.raises(ValueError, match="row 3"):
        next(feed)


class Ranks:
    """Ranks of one process that call the collectives of `World` from a thread each."""

    def __init__(self, size: int):
        self._barrier, self._given = threading.Barrier(size, timeout=30), [None] * size

    def gather(self, rank: int, value):
        self._given[rank] = value
        self._barrier.wait()
        given = list(self._given)
        self._barrier.wait()
        return given


@pytest.fixture
def no_rows(monkeypatch):
    monkeypatch.setattr("dstune.trainer.prefetcher.share", lambda *_: [])
    monkeypatch.setattr("dstune.trainer.prefetcher.WAIT_SECONDS", 0.05)
    return StepBatch(SimpleNamespace(images=None), GlobalBatch((), 0.0, 0), 0.5)


def all_see(*prepare):
    """How often each rank waited, and what came of it, where rank i prepares its global batch with `prepare[i]`."""
    ranks = Ranks(len(prepare))

    def run(rank: int):
        world = SimpleNamespace(
            gather=lambda value: ranks.gather(rank, value),
            sum=lambda numbers: np.sum(ranks.gather(rank, numbers), axis=0).tolist(),
            data_parallel_rank=rank,
            data_parallel_size=len(prepare),
            size=len(prepare),
        )
        data_loader = SimpleNamespace(may_wait=lambda step: True, begin=lambda step: None, interrupt=lambda: None)
        data_loader.load = lambda step: prepare[rank]()
        rounds = 0
        try:
            for feed in prefetched_steps(run_config(), data_loader, world, 0, range(1), None):
                if feed is not None:
                    return rounds, feed.epoch
                rounds += 1
        except DstuneError as error:
            return rounds, str(error)

    with ThreadPoolExecutor(len(prepare)) as pool:
        return list(pool.map(run, range(len(prepare))))


def test_while_one_rank_waits_for_its_rows_all_of_them_come_to_agree(no_rows):
    def slow():
        time.sleep(0.5)
        return no_rows

    (ready, epoch), (waiting, same) = all_see(lambda: no_rows, slow)
    assert epoch == same == 0.5
    assert ready == waiting > 3


def test_an_error_in_the_rows_of_one_rank_is_raised_by_all(no_rows):
    def broken():
        raise UserError(Problem("data.train", "changed"))

    def slow():
        time.sleep(2)
        return no_rows

    results = all_see(slow, broken)
    assert [message for _, message in results] == ["data.train: changed"] * 2


def test_the_wait_for_rows_ends_when_a_stop_is_requested(tmp_path, monkeypatch):
    monkeypatch.setattr("signal.signal", lambda number, action: None)
    config = run_config()
    config = replace(config, run=replace(config.run, time_limit=1.0))
    preemption = Preemption(config, time.monotonic(), tmp_path, is_main=True)
    assert preemption.while_waiting(at()).action is Action.CONTINUE
    (tmp_path / "STOP").touch()
    assert preemption.while_waiting(at()).action is Action.PREEMPT
    assert preemption.while_waiting(at(save_seconds=30.0)).action is Action.PREEMPT  # 3 * 30 s do not fit


def test_a_signal_that_comes_two_ways_is_one_request(tmp_path, monkeypatch):
    """To the whole cgroup: once by itself, once handed on by the launcher."""
    ended, clock = [], [10.0]
    monkeypatch.setattr("dstune.trainer.callbacks.preemption.signal.signal", lambda number, action: None)
    monkeypatch.setattr("dstune.trainer.callbacks.preemption.signal.raise_signal", ended.append)
    monkeypatch.setattr("dstune.trainer.callbacks.preemption.time.monotonic", lambda: clock[0])
    preemption = Preemption(run_config(), 0.0, tmp_path, is_main=True)
    for moment in (10.0, 10.1, 10.9):
        clock[0] = moment
        preemption._receive(signal.SIGTERM, None)
    assert not ended
    assert preemption.while_waiting(at()).action is Action.PREEMPT
    clock[0] = 11.5
    preemption._receive(signal.SIGTERM, None)
    assert ended == [signal.SIGTERM]


def test_a_signal_that_a_queue_sends_and_an_agent_hands_on_later_is_one_request(tmp_path, monkeypatch):
    ended, clock = [], [10.0]
    monkeypatch.setattr("dstune.trainer.callbacks.preemption.signal.signal", lambda number, action: None)
    monkeypatch.setattr("dstune.trainer.callbacks.preemption.signal.raise_signal", ended.append)
    monkeypatch.setattr("dstune.trainer.callbacks.preemption.time.monotonic", lambda: clock[0])
    (tmp_path / "logs").mkdir()
    for forwarded, ends in (("SIGUSR1", []), ("SIGTERM", [signal.SIGTERM])):
        ended.clear()
        (tmp_path / "logs" / "signal").write_text(forwarded)
        preemption = Preemption(run_config(), 0.0, tmp_path, is_main=True)
        preemption._receive(signal.SIGUSR1, None)
        clock[0] += 30.0
        preemption._receive(signal.SIGTERM, None)
        assert ended == ends
        clock[0] += 30.0
        preemption._receive(signal.SIGTERM, None)  # a further one is meant
        assert ended[-1] == signal.SIGTERM


def test_a_notice_during_imports_is_taken_once_the_rank_can_save(tmp_path):
    """By SLURM's `--signal`, whose default action would end the rank."""
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)}
    try:
        hold_notices()
        signal.raise_signal(signal.SIGUSR1)  # to this thread: those of other tests hold nothing back
        preemption = Preemption(run_config(), time.monotonic(), tmp_path, is_main=True)
        assert preemption.while_waiting(at()).reason == "received SIGUSR1"
    finally:
        take_notices()
        for number, action in before.items():
            signal.signal(number, action)
    program = """import signal, sys, types
for name, function in (("process", "exit_now"), ("worker", "main")):
    sys.modules[f"dstune.rank.{name}"] = types.SimpleNamespace(**{function: None})
import dstune.worker
print(signal.SIGUSR1 in signal.pthread_sigmask(signal.SIG_BLOCK, ()))"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr


def test_a_trial_that_its_sweep_ends_leaves_without_a_save(tmp_path, monkeypatch):
    monkeypatch.setattr("signal.signal", lambda number, action: None)
    preemption = Preemption(run_config(), time.monotonic(), tmp_path, is_main=True)
    (tmp_path / "PRUNE").write_text("pruned (asha) at step 4")
    request = preemption.while_waiting(at())
    assert request == Request(Action.PRUNE, "pruned (asha) at step 4")
    assert not request.action & (Action.SAVE | Action.PREEMPT)
    other = Preemption(run_config(), time.monotonic(), tmp_path, is_main=False)
    assert other.while_waiting(at()).action is Action.CONTINUE


def test_both_stages_of_a_run_have_one_time_limit_and_one_place_for_stop(tmp_path, monkeypatch):
    monkeypatch.setattr("signal.signal", lambda number, action: None)
    seen = []
    monkeypatch.setattr(worker, "train_stage", lambda config, folder, world, asks, *began: seen.append((folder, asks)))
    world = SimpleNamespace(is_main=True, broadcast=lambda value: value, barrier=lambda: None)
    method = UlmfitConfig(language_model_epochs=1)
    worker.train(at_stage(run_config(task=ClassificationConfig(), method=method), 2), tmp_path, world)
    (first, asks), (second, same) = seen
    assert (first, second) == (tmp_path / "language_model", tmp_path)
    assert asks is same
    (tmp_path / "STOP").touch()
    assert asks.while_waiting(at()).action is Action.PREEMPT


def test_a_run_that_goes_on_from_another_takes_over_its_language_model(tmp_path, monkeypatch):
    """The checkpoint is of a classifier above it; trained again it would be another one, and take as long again."""
    monkeypatch.setattr("signal.signal", lambda number, action: None)
    seen = []
    monkeypatch.setattr(
        worker, "train_stage", lambda config, folder, world, asks, *began: seen.append((folder, config))
    )
    world = SimpleNamespace(is_main=True, broadcast=lambda value: value, barrier=lambda: None)
    other, own = tmp_path / "other", tmp_path / "own"
    (other / "language_model" / "export").mkdir(parents=True)
    (other / "language_model" / "export" / "config.json").write_text("{}")
    config = at_stage(run_config(task=ClassificationConfig(), method=UlmfitConfig(language_model_epochs=1)), 2)
    worker.train(replace(config, run=replace(config.run, resume=str(other))), own, world)
    ((folder, stage),) = seen
    export = own / "language_model" / "export"
    assert folder == own and stage.model.path == str(export)
    assert (export / "config.json").read_text() == "{}"


def test_feed_thread_ends_when_the_loop_leaves_early():
    feed = Prefetcher(lambda step: step, range(10**9))
    assert next(feed) == 0
    feed.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "feed"]


@pytest.mark.parametrize(("ranks", "closed"), [(1, True), (2, False)])
def test_a_failed_run_is_closed_where_its_process_may_live_on(monkeypatch, tmp_path, ranks, closed):
    """A notebook goes on with another run, which needs the memory. Of several ranks the device may wait for one that is gone."""
    seen = []

    def close():
        seen.append("closed")
        raise RuntimeError("a fault of the device")

    class Fails(worker.Setup):
        def __init__(self, *given):
            self.world, self.task = SimpleNamespace(size=ranks, rank=0), None

        configure_rank = load_data = build_model = lambda self, *given: None

        def prepare_method(self, *given):
            return None, None

        def build_engine(self, *given):
            return SimpleNamespace(close=close)

        def check_arithmetic(self, *given):
            raise TrainingFailed("out of memory")

    monkeypatch.setattr(worker, "Setup", Fails)
    with pytest.raises(TrainingFailed, match="out of memory"):
        worker.train_stage(None, tmp_path, SimpleNamespace(size=ranks), None, worker.StartupTimer())
    assert bool(seen) == closed
