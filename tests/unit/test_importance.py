"""From scores to what is trained, against hand arithmetic; what the report says of it."""

from __future__ import annotations

import json

import pytest
import torch

from dstune.methods.importance.choice import chosen_tensors, rank_correlation, sortable, threshold
from dstune.methods.importance.scores import MASKS, REPORT, take_over
from dstune.report.importance import importance
from dstune.report.numbers import percent
from dstune.zero.masks import pack_bits, unpack_bits


def test_tensors_by_score_until_the_share_is_full():
    sizes = {"a": 60, "b": 30, "c": 5, "d": 5}
    scores = {"a": 3.0, "b": 2.0, "c": 1.0, "d": 4.0}
    assert chosen_tensors(scores, sizes, 0.40) == ["d", "b", "c"]  # a has no room
    assert chosen_tensors(scores, sizes, 0.65) == ["d", "a"]
    assert chosen_tensors({"a": 9.0, **dict.fromkeys("bcd", 0.0)}, sizes, 0.1) == ["a"]  # one in any case


def test_keys_are_in_the_order_of_the_scores():
    scores = torch.tensor([-3e38, -1.5, -1e-30, -0.0, 0.0, 1e-40, 2.0, float("inf")])
    keys = sortable(scores)
    assert (keys[1:] >= keys[:-1]).all() and keys[5] > keys[4] > keys[2]


@pytest.mark.parametrize(("count", "taken"), [(0, 0), (1, 1), (2, 1), (3, 3), (5, 5), (9, 6)])
def test_threshold_takes_equal_scores_together(count, taken):
    keys = sortable(torch.tensor([0.5, 0.25, 0.25, -1.0, -2.0, -3.0]))
    lowest = threshold(lambda key: int((keys >= key).sum()), count)
    assert int((keys >= lowest).sum()) == taken


@pytest.mark.parametrize("shape", [(1,), (8,), (3, 7), (2, 2, 5)])
def test_bits_come_back(shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) > 0.5
    bits = pack_bits(mask)
    assert bits.dtype == torch.uint8 and bits.numel() == -(-mask.numel() // 8)
    assert torch.equal(unpack_bits(bits, mask.shape), mask)


def test_rank_correlation():
    left = {"a": 1.0, "b": 2.0, "c": 3.0, "d": 40.0}
    # ranks 1 2 3 4 and 1 3 2 4: 1 - 6 * (0 + 1 + 1 + 0) / (4 * 15)
    found = rank_correlation(left, {"a": 0.0, "b": 7.0, "c": 5.0, "d": 8.0})
    assert found["spearman"] == pytest.approx(0.8) and found["tensors"] == 4
    assert rank_correlation(left, {name: -value for name, value in left.items()})["spearman"] == pytest.approx(-1)


def test_report_shows_ranks_and_correlation(tmp_path):
    assert importance(tmp_path) is None
    tensors = [
        {
            "name": f"layer.{number}.weight",
            "shape": [4, 5],
            "trained": 5 * number,
            "scores": {"gradient_weight": float(number), "ablation": -float(number)},
            "lost": {"loss": -float(number)},
        }
        for number in (2, 1, 0)
    ]
    report = {
        "selection": "gradient_weight",
        "unit": "entries",
        "trained_share": 0.25,
        "steps": 8,
        "correlation": {"gradient_weight": {"spearman": -1.0, "p": 0.0, "tensors": 3}},
        "tensors": tensors,
    }
    (tmp_path / "importance.json").write_text(json.dumps(report))
    found = importance(tmp_path)
    assert found is not None
    assert found.rows[0] == ["layer.2.weight", "4 x 5", "2", percent(0.5), "-2.0000"]
    assert found.correlations == [("gradient weight", "-1.00")]
    # Highest by gradients is lowest by ablation: right and at the bottom.
    assert found.dots[0] == (100.0, 100.0, "layer.2.weight") and found.dots[2] == (0.0, 0.0, "layer.0.weight")
    (tmp_path / "importance.json").write_text("{torn")
    assert importance(tmp_path) is None


def test_a_run_that_continues_another_takes_over_its_choice(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    take_over(first, second)
    assert not list(second.iterdir())
    (first / REPORT).write_text("first")
    (first / MASKS).write_text("bits")
    take_over(first, second)
    assert {file.name: file.read_text() for file in second.iterdir()} == {REPORT: "first", MASKS: "bits"}
    (second / REPORT).write_text("second")
    take_over(first, second)
    assert (second / REPORT).read_text() == "second"
