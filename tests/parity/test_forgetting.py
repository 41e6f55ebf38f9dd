"""Penalties against forgetting equal those of a plain torch loop at every ZeRO stage; replay mixes in its share."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from parity.reference import train_plainly
from parity.test_ladder import PROGRAM, STAGES, Workshop, exact, monkeypatch_module, workshop  # noqa: F401 (fixtures)
from support.configs import run_config
from support.ranks import run_ranks
from support.tiny import write_dialogues

from dstune.config.forgetting import measured_alone, with_replay
from dstune.config.forgetting_schema import ForgettingConfig
from dstune.core.errors import TrainingFailed
from dstune.evaluation import command as evaluate
from dstune.trainer import forgetting

SHORT = ["data.packing=false", "data.split.validation=0", "run.export=last", "trainer.max_steps=4"]


@pytest.fixture(scope="module")
def penalised(workshop: Workshop) -> list[str]:  # noqa: F811
    general = write_dialogues(workshop.folder / "general.jsonl", 20, seed=5)
    return [
        *SHORT,
        "forgetting.l2sp=0.5",
        f"forgetting.general={general}",
        "forgetting.ewc=2.0",
        "forgetting.ewc_rows=6",
    ]


def test_penalties_are_those_of_the_plain_loop(workshop: Workshop, penalised: list[str]):  # noqa: F811
    cache = workshop.folder / "cache"
    config = workshop.composed("plain", *penalised).config
    expected = train_plainly(config, cache)
    free = train_plainly(workshop.composed("free", *SHORT).config, cache)
    assert max(float((free.weights[key] - weight).abs().max()) for key, weight in expected.weights.items()) > 1e-3
    limit = "run.time_limit=0.000001"  # over after the first step of each launch
    one = [workshop.case("pulled-1-2", *penalised, "zero=stage2")]
    run_ranks(PROGRAM, 1, one)
    three = [workshop.case(f"pulled-3-{stage}", *penalised, f"zero=stage{stage}") for stage in STAGES]
    cut = [workshop.case("pulled-cut", *penalised, "zero=stage3", limit, directory="pulled-cut")]
    end = [workshop.case("pulled-end", *penalised, "zero=stage3", directory="pulled-cut")]
    run_ranks(PROGRAM, 3, [*three, *cut, *cut, *end])
    for name in ("pulled-1-2", *(f"pulled-3-{stage}" for stage in STAGES)):
        rows = workshop.rows(name)
        assert [row["loss"] for row in rows] == pytest.approx(expected.losses, rel=1e-5), name
        # The first step is still at the start weights.
        assert rows[0]["penalty"] == 0 and all(row["penalty"] > 0 for row in rows[1:])
        trained = workshop.weights(name)
        for key, weight in expected.weights.items():
            assert (trained[key] - weight).abs().max() < 2e-6, f"{name}: {key}"
    assert exact(workshop.folder / "pulled-cut") == exact(workshop.folder / "pulled-3-3")


def test_a_run_is_measured_without_the_rows_that_it_was_not_to_forget(workshop: Workshop, penalised, capsys):  # noqa: F811
    name = workshop.case("measured", *penalised, "zero=stage2", "trainer.max_steps=1", "forgetting.ewc_rows=1")
    run_ranks(PROGRAM, 2, [name])
    general = workshop.folder / "general.jsonl"
    general.rename(workshop.folder / "gone.jsonl")
    try:
        run, rows = workshop.folder / "measured", write_dialogues(workshop.folder / "held-out.jsonl", 6, seed=3)
        assert evaluate.main([str(run), "--json", f"data.validation={rows}", "launch.processes=1"]) == 0
    finally:
        (workshop.folder / "gone.jsonl").rename(general)
    assert json.loads(capsys.readouterr().out)["rows"] == 6


def test_what_fills_a_partition_up_does_not_count():
    """A partition of two weights and one element of whatever was in memory."""
    fragment = SimpleNamespace(name="weight", offset=0, count=2)
    elements = torch.tensor([1.0, 2.0, float("nan")])
    partition = SimpleNamespace(key=object(), elements=elements, fragments=[fragment])
    engine = SimpleNamespace(partitions=lambda: [partition])
    config = ForgettingConfig(l2sp=0.5)
    penalties = forgetting.Penalties(config, engine, SimpleNamespace(parameters=()), {})
    elements[:2] += 2.0
    gradient = torch.zeros(3)
    penalties.add(partition, gradient)
    assert gradient.tolist() == [1.0, 1.0, 0.0]
    assert penalties.collect() == 0.5 * 0.5 * (4.0 + 4.0)


def test_rows_without_a_finite_gradient_are_left_out_of_the_mean(monkeypatch):
    """The mean is over the rows whose gradients were seen, not over those that were asked for."""
    fragment = SimpleNamespace(name="weight", offset=0, count=2)

    def train(rows: int, add: Any, rate: float) -> int:
        assert rows == 6
        for _ in range(finite):
            add(SimpleNamespace(fragments=[fragment]), torch.tensor([2.0, -3.0]), {})
        return finite

    probe = SimpleNamespace(engine=SimpleNamespace(train=lambda mode: None), train=train)
    monkeypatch.setattr(forgetting, "probing", lambda *arguments: nullcontext(probe))
    config = run_config(forgetting=ForgettingConfig(ewc=1.0, ewc_rows=6, general="general.jsonl"))
    finite = 4
    found = forgetting.fisher_information(config, None, None, None, None)
    assert found["weight"].tolist() == [4.0, 9.0]
    finite = 0
    with pytest.raises(TrainingFailed, match=r"forgetting\.ewc"):
        forgetting.fisher_information(config, None, None, None, None)


def test_replay_mixes_in_its_share_and_holds_out_rows_of_the_task_alone(workshop: Workshop):  # noqa: F811
    from dstune.core.rank_env import RankEnv
    from dstune.data.build import prepare
    from dstune.models.load import load_tokenizer
    from dstune.trainer.data_loader import order_of

    general = write_dialogues(workshop.folder / "replayed.jsonl", 100, seed=9)
    plain = workshop.composed("plain-rows", "data.packing=false").config
    replayed = replace(plain, forgetting=replace(plain.forgetting, general=str(general), replay=0.25))
    tokenizer, env, cache = load_tokenizer(plain.model), RankEnv(0, 1, 0, 1, "test"), workshop.folder / "cache"
    before = prepare(plain, tokenizer, env, cache)
    config = with_replay(replayed)
    assert with_replay(config) == config
    assert measured_alone(config) == plain
    data = prepare(config, tokenizer, env, cache)
    assert data.validation is not None and before.validation is not None
    assert data.validation.table["input_ids"][:] == before.validation.table["input_ids"][:]
    order = order_of(config, data.train)
    epoch = [order.global_batch(0, index) for index in range(order.steps_in(0))]
    samples = [
        sample for global_batch in epoch for micro_batch in global_batch.micro_batches for sample in micro_batch.samples
    ]
    from_general = sum(int(data.train.sources[sample]) for sample in samples)
    assert len(samples) - from_general == len(before.train.lengths)
    assert from_general / len(samples) == pytest.approx(0.25, abs=0.02)
    share = data.report["train"]["sources"]["general"]["weight"]
    assert share == pytest.approx(len(before.train.lengths) / 3 / 100, abs=1e-3)
