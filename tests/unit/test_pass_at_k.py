"""pass@k beside counting all choices of k completions, its interval, and what the signal of a group is."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from dstune.generation.completions import Completion
from dstune.tasks.reinforcement.config import ReinforcementConfig
from dstune.tasks.reinforcement.evaluate import pass_at_k, passes
from dstune.tasks.reinforcement.metrics import lacks_signal, rollout_sums
from dstune.tasks.reinforcement.records import Scored
from dstune.tasks.reinforcement.scoring import overlong_score


def group(*scores: float | None, failures: int = 0) -> list[Scored]:
    scored = [Scored(Completion(0, number), "", [score]) for number, score in enumerate(scores)]
    for one in scored[:failures]:
        one.failures = {"number": "down"}
    return scored


def test_it_is_the_share_of_choices_with_a_right_completion():
    counts = [(6, 2), (6, 0), (6, 6), (5, 1)]
    rates = pass_at_k(counts, 6)
    assert {name for name in rates if "/" not in name} == {"pass_at_1", "pass_at_2", "pass_at_4", "pass_at_6"}
    for size in (1, 2, 4, 6):
        shares = []
        for n, c in counts:
            choices = [any(choice) for choice in itertools.combinations([True] * c + [False] * (n - c), size)]
            shares += [sum(choices) / len(choices)] if choices else []
        assert rates[f"pass_at_{size}"] == pytest.approx(sum(shares) / len(shares)), size
    assert math.isnan(pass_at_k([(1, 1)], 2)["pass_at_2"]), "no prompt has two scored completions"


def test_the_interval_covers_the_true_rate_and_repeats():
    """Of 200 problems, each solved with its own probability: 95% intervals of pass@1 miss 0.5 about once in twenty."""
    chance, missed = random.Random(3), 0
    for _ in range(100):
        counts = []
        for _ in range(200):
            solved = chance.random()
            counts.append((4, sum(chance.random() < solved for _ in range(4))))
        rates = pass_at_k(counts, 4)
        assert rates == pass_at_k(counts, 4)
        missed += not rates["pass_at_1/low"] <= 0.5 <= rates["pass_at_1/high"]
    assert 1 <= missed <= 11, missed


def test_completions_without_a_score_are_not_tried():
    task = ReinforcementConfig(rewards=["number"], pass_reward=0.5)
    assert passes(task, group(1.0, 0.5, 0.4, None)) == (3, 2)
    assert passes(task, group(1.0, 1.0, failures=1)) == (1, 1)


def test_equal_rewards_are_no_signal_whatever_their_rounding():
    task = ReinforcementConfig(rewards=["number"])
    assert lacks_signal(task, group(0.1, 0.1, 0.1))
    assert lacks_signal(task, group(None, 0.1))
    assert not lacks_signal(task, group(0.0, 1.0, None))
    assert not lacks_signal(task, group(1.0, 1.0, failures=1)), "a reward that is down says nothing about the prompt"
    sums = rollout_sums(task, [group(0.1, 0.1, 0.1), group(0.0, 0.1, 0.1)])
    assert sums["equal_groups"] == 1, "the deviation of three times 0.1 is 1.7e-17"


def test_the_length_alone_is_no_signal_and_its_penalty_falls_evenly():
    task = ReinforcementConfig(rewards=["number"], overlong_tokens=4, max_new_tokens=10)
    scored = group(0.0, 0.0)
    for one, length in zip(scored, (5, 8), strict=True):
        one.completion.ids = [1] * length
        one.scores.append(overlong_score(task, one))
    assert [one.scores[-1] for one in scored] == [0.0, -0.5]
    assert lacks_signal(task, scored)
    completions = [Completion(0, 0, [1] * length) for length in (6, 7, 10, 12)]
    ends = [overlong_score(task, Scored(completion, "", [1.0])) for completion in completions]
    assert ends == [0.0, -0.25, -1.0, -1.0]
    assert overlong_score(task, Scored(Completion(0, 0, [1] * 9), "", [None])) is None
