"""The guard against leaps of the loss, and the comparison of ranks: by hand arithmetic."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.configs import run_config

from dstune.config.schema import SpikeAction, SpikeConfig, TrainerConfig
from dstune.config.validate import find_problems
from dstune.trainer.callbacks.spikes import Spikes
from dstune.trainer.callbacks.stragglers import PATIENCE, Stragglers


def guard(losses: list[float], action: str = "skip", **settings) -> Spikes:
    """After steps with these losses."""
    spike = SpikeConfig(action=SpikeAction(action), window=8, **settings)
    spikes = Spikes(run_config(trainer=TrainerConfig(spike=spike)))
    for number, loss in enumerate(losses):
        spikes.note(number + 1, loss)
    return spikes


def test_the_score_is_that_of_median_and_absolute_deviation():
    judge = guard([2.0, 2.1, 1.9, 2.2, 1.8])  # median 2.0, deviations 0 .1 .1 .2 .2: median 0.1
    assert judge.score(3.0) == pytest.approx(1.0 / (1.4826 * 0.1))
    assert not judge.is_spike(3.0)
    assert judge.is_spike(3.2)
    assert not judge.is_spike(0.1)  # a fall is none
    assert judge.score(float("nan")) is None


def test_one_spike_does_not_hide_the_next_and_few_losses_are_not_judged():
    assert guard([2.0, 2.1, 1.9]).score(100.0) is None  # half of the window is four
    judge = guard([2.0, 2.1, 1.9, 2.2, 1.8, 50.0])
    found = judge.results()["spikes"]
    assert {name: found[name] for name in ("warned", "skipped", "rolled_back")} == {
        "warned": 0,
        "skipped": 1,
        "rolled_back": 0,
    }
    assert judge.is_spike(50.0)


def test_a_new_level_is_learnt_and_equal_losses_are_no_alarm():
    judge = guard([2.0] * 8)
    assert not judge.is_spike(2.01)  # the spread counts as 0.1% of the median at least: 5 deviations
    assert judge.is_spike(2.1)
    judge = guard([2.0, 2.1, 1.9, 2.2, 1.8] + [9.0] * 6)
    assert not judge.is_spike(9.0)


def test_what_is_remembered_survives_a_resume():
    losses = [2.0 + 0.1 / 3 * number for number in range(20)]
    whole, resumed = guard(losses), guard([])
    resumed.load_state_dict(guard(losses[:12]).state_dict())
    for number, loss in enumerate(losses[12:]):
        resumed.note(13 + number, loss)
    assert resumed.state_dict() == whole.state_dict()
    assert len(whole.state_dict()["losses"]) == 8


def test_too_many_spikes_end_the_run():
    judge = guard([2.0, 2.1, 1.9, 2.2, 50.0], limit=1)
    assert judge.stop_reason() == ""
    judge.note(6, 60.0)
    assert "spiked in 2 steps, the last one step 6" in judge.stop_reason()


def test_going_back_needs_checkpoints():
    trainer = TrainerConfig(spike=SpikeConfig(action=SpikeAction.rollback))
    config = run_config(trainer=trainer)
    [problem] = find_problems(replace(config, checkpoint=replace(config.checkpoint, every=0)))
    assert problem.where == "trainer.spike.action"
    assert not find_problems(replace(config, checkpoint=replace(config.checkpoint, every=5)))


def test_a_rank_that_is_slow_for_long_is_named_once():
    ranks = Stragglers()
    messages = [ranks.compare([1.0, 1.1, 2.0, 1.0]) for _ in range(2 * PATIENCE)]
    assert [line for line in messages if line] == [messages[PATIENCE - 1]]
    assert "rank 2 is slow: its own work takes 1.9 times" in messages[PATIENCE - 1]
    assert not any(Stragglers().compare([1.0, 1.2, 1.4]) for _ in range(2 * PATIENCE))
