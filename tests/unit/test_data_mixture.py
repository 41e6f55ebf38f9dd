"""Mixtures: rows of an epoch as a pure function of (seed, epoch), weights exact over epochs, caps, formats, counts."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from unit.data_helpers import byte_tokenizer, chats, data_run, exchange, prepared, write_jsonl

from dstune.config.data_schema import SourceConfig, SplitConfig
from dstune.core.errors import UserError
from dstune.data.mixture import capped
from dstune.data.repeats import Repeats
from dstune.data.sampler import TrainingOrder
from dstune.tasks.classification.config import ClassificationConfig
from dstune.trainer.data_loader import order_of

SOURCES = np.array([0] * 10 + [1] * 7 + [2] * 100, dtype=np.int16)
WEIGHTS = [0.3, 2.5, 0.29]


@pytest.mark.parametrize("epochs", [1, 2, 7, 10])
def test_no_weight_is_lost_over_any_number_of_epochs(epochs):
    repeats = Repeats(SOURCES, WEIGHTS, seed=3)
    seen = Counter(sample for epoch in range(epochs) for sample in repeats.samples(epoch).tolist())
    for source, weight in enumerate(WEIGHTS):
        members = np.flatnonzero(np.equal(SOURCES, source))
        counts = [seen[sample] for sample in members.tolist()]
        assert sum(counts) == int(round(weight * 100) * epochs * len(members) / 100)  # floor of the exact product
        assert max(counts) - min(counts) <= 1


def test_half_of_a_source_and_then_the_other_half():
    repeats = Repeats(np.zeros(8, dtype=np.int16), [0.5], seed=0)
    first, second, third = (set(repeats.samples(epoch).tolist()) for epoch in range(3))
    assert len(first) == len(second) == 4
    assert first | second == set(range(8))
    assert third != first  # another pass, another order


def test_an_epoch_is_a_function_of_seed_and_epoch_alone():
    forward = [Repeats(SOURCES, WEIGHTS, seed=1).samples(epoch).tolist() for epoch in range(6)]
    repeats = Repeats(SOURCES, WEIGHTS, seed=1)
    backward = [repeats.samples(epoch).tolist() for epoch in reversed(range(6))][::-1]
    assert forward == backward
    assert forward != [Repeats(SOURCES, WEIGHTS, seed=2).samples(epoch).tolist() for epoch in range(6)]


def test_the_decimal_that_was_written_counts():
    """The float nearest to 0.29 times 100 is 28.999999999999996."""
    assert len(Repeats(np.zeros(100, dtype=np.int16), [0.29], seed=0).samples(0)) == 29


def order(packing: bool, weights: list[float] = WEIGHTS) -> TrainingOrder:
    lengths = np.random.default_rng(0).integers(3, 30, len(SOURCES)).astype(np.int32)
    return TrainingOrder(
        lengths,
        lengths.astype(np.int64),
        micro_batch_size=2,
        global_batch_size=7,
        max_length=32,
        packing=packing,
        length_grouping=not packing,
        seed=5,
        repeats=Repeats(SOURCES, weights, 5),
    )


@pytest.mark.parametrize("packing", [False, True])
def test_steps_are_counted_where_epochs_differ_in_length(packing):
    training = order(packing)
    steps = [training.steps_in(epoch) for epoch in range(8)]
    assert len(set(steps)) > 1
    assert [training.steps(epochs) for epochs in range(9)] == [0, *np.cumsum(steps).tolist()]
    places = [(epoch, index) for epoch, count in enumerate(steps) for index in range(count)]
    assert [order(packing).locate(step) for step in range(len(places))] == places  # without having counted before
    assert order(packing).locate(len(places) - 1) == places[-1]
    drawn = Counter(
        s for place in places for micro in training.global_batch(*place).micro_batches for s in micro.samples
    )
    expected = Counter(s for epoch in range(8) for s in Repeats(SOURCES, WEIGHTS, 5).samples(epoch).tolist())
    assert drawn == expected


def test_an_epoch_without_samples_is_passed_over():
    training = order(False, [0.04, 0.02, 0.001])
    assert training.steps_in(0) == 0
    epoch, index = training.locate(0)
    assert (training.steps_in(epoch), index) == (1, 0)
    assert training.locate(1)[0] > epoch


def test_a_cap_takes_the_same_rows_every_time_and_leaves_both_parts():
    hashes = np.random.default_rng(1).integers(0, 2**64, 20_000, dtype=np.uint64)
    kept = capped(hashes, 1000)
    assert kept.sum() == 1000
    shuffled = np.random.default_rng(2).permutation(len(hashes))
    assert set(hashes[shuffled][capped(hashes[shuffled], 1000)]) == set(hashes[kept])
    held_out = (hashes[kept] / 2.0**64 < 0.05).mean()
    assert 0.02 < held_out < 0.09  # as in all of the rows, since the cap and the split look at other bits
    assert capped(hashes, 30_000).all()


def two_sources(folder: Path, **few: object) -> dict[str, SourceConfig]:
    write_jsonl(folder / "many.jsonl", chats(200))
    write_jsonl(folder / "few.jsonl", [{"q": f"Say {n}.", "a": f"It is {n}."} for n in range(40)])
    return {
        "many": SourceConfig(path=str(folder / "many.jsonl"), weight=0.5),
        "few": SourceConfig(
            path=str(folder / "few.jsonl"), weight=2, columns={"prompt": "q", "completion": "a"}, **few
        ),
    }


def test_sources_with_formats_of_their_own_are_one_table_with_counts(tmp_path):
    config = data_run("", mixture=two_sources(tmp_path, max_rows=30), split=SplitConfig(validation=0.1), max_length=128)
    data = prepared(config, byte_tokenizer(), tmp_path / "cache")
    counts = data.report["train"]["sources"]
    assert list(counts) == ["many", "few"]
    assert counts["many"]["rows_read"] == 200
    assert counts["few"]["rows_read"] == 40
    assert data.validation is not None
    held_out = np.bincount(data.validation.sources, minlength=2)
    assert counts["few"]["rows"] + held_out[1] == 30
    assert counts["many"]["rows"] + held_out[0] == 200
    assert (held_out > 0).all()
    for number, name in enumerate(counts):
        mine = data.train.sources == number
        assert counts[name]["samples"] == mine.sum()
        assert counts[name]["targets"] == data.train.weights[mine].sum()
        assert counts[name]["tokens"] == data.train.lengths[mine].sum()
    many, few = 0.5 * counts["many"]["targets"], 2 * counts["few"]["targets"]
    assert counts["few"]["target_share"] == pytest.approx(few / (many + few), abs=1e-6)
    training = order_of(config, data.train)
    assert len(training._repeats.samples(0)) == counts["many"]["samples"] // 2 + 2 * counts["few"]["samples"]


def test_another_weight_is_another_order_of_the_same_samples(tmp_path):
    sources = two_sources(tmp_path)
    first = prepared(data_run("", mixture=sources), byte_tokenizer(), tmp_path / "cache")
    sources["few"] = SourceConfig(**(vars(sources["few"]) | {"weight": 5.0}))
    again = prepared(data_run("", mixture=sources), byte_tokenizer(), tmp_path / "cache")
    assert again.fingerprint == first.fingerprint
    assert again.report["train"]["sources"]["few"]["weight"] == 5.0
    sources["few"] = SourceConfig(**(vars(sources["few"]) | {"max_rows": 7}))
    assert (
        prepared(data_run("", mixture=sources), byte_tokenizer(), tmp_path / "cache").fingerprint != first.fingerprint
    )


def test_bad_rows_and_missing_files_name_source_and_line(tmp_path):
    write_jsonl(tmp_path / "good.jsonl", chats(5))
    write_jsonl(tmp_path / "bad.jsonl", [exchange("a", "b"), {"messages": []}])
    mixture = {
        "good": SourceConfig(path=str(tmp_path / "good.jsonl")),
        "bad": SourceConfig(path=str(tmp_path / "bad.jsonl")),
    }
    with pytest.raises(UserError) as raised:
        prepared(data_run("", mixture=mixture), byte_tokenizer(), tmp_path / "cache")
    assert [problem.where for problem in raised.value.problems] == [f"{tmp_path / 'bad.jsonl'}:2"]
    mixture["gone"] = SourceConfig(path=str(tmp_path / "gone.jsonl"))
    with pytest.raises(UserError) as raised:
        prepared(data_run("", mixture=mixture), byte_tokenizer(), tmp_path / "cache")
    assert [problem.where for problem in raised.value.problems] == ["data.mixture.gone.path"]


def test_labels_of_all_sources_are_found(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": f"left {n}", "label": "left"} for n in range(20)])
    write_jsonl(tmp_path / "b.jsonl", [{"text": f"right {n}", "label": "right"} for n in range(20)])
    mixture = {name: SourceConfig(path=str(tmp_path / f"{name}.jsonl")) for name in "ab"}
    config = data_run("", mixture=mixture, packing=False, task=ClassificationConfig())
    data = prepared(config, byte_tokenizer(), tmp_path / "cache")
    assert data.labels == ("left", "right")
    assert np.bincount(data.train.sources).tolist() == [16, 16]
