"""A callback of a user's own on 2 ranks: its veto, gradients, numbers, requests, and its state after a resume."""

from __future__ import annotations

import pytest
import torch
from parity.test_ladder import PROGRAM, Workshop, exact, monkeypatch_module, workshop  # noqa: F401 (fixtures)
from support.ranks import run_ranks

from dstune.checkpoint import store

STAGES = (0, 2)
OWN = ["trainer.callbacks=[{support.own_callbacks.Meddler:{vetoed:3}}]", "data.packing=false", "trainer.max_steps=5"]


@pytest.fixture(scope="module")
def runs(workshop: Workshop) -> Workshop:  # noqa: F811
    limit = "run.time_limit=0.000001"  # over after the first step of each launch
    cases, short = [], ["data.packing=false"]
    for stage in STAGES:
        zero = f"zero=stage{stage}"
        cases += [
            workshop.case(f"whole-{stage}", *OWN, zero, "checkpoint.keep=20"),
            *[workshop.case(f"cut-{stage}", *OWN, zero, limit, directory=f"cut-{stage}")] * 3,
            workshop.case(f"end-{stage}", *OWN, zero, directory=f"cut-{stage}"),
            workshop.case(f"plain-{stage}", *short, zero, "trainer.max_steps=2"),
            workshop.case(f"skipped-{stage}", *OWN, zero, "trainer.max_steps=3"),
            workshop.case(f"halved-{stage}", *OWN, zero, "trainer.max_steps=4"),
        ]
    run_ranks(PROGRAM, 2, cases)
    return workshop


@pytest.mark.parametrize("stage", STAGES)
def test_it_vetoes_changes_gradients_and_asks_from_one_rank(runs: Workshop, stage: int):
    rows = runs.rows(f"whole-{stage}")
    assert [row.get("skipped") for row in rows] == [None, None, "spike", None, None]
    assert rows[-1]["meddler/total"] == pytest.approx(sum(row["loss"] for row in rows))
    assert all(row[f"meddler/loss_of_rank_{rank}"] == row["loss"] for row in rows for rank in (0, 1))
    # Five micro-batches on two ranks; four in the last step of the epoch.
    assert [row["meddler/batches"] for row in rows] == [3, 3, 3, 3, 2]
    assert runs.result(f"whole-{stage}")["meddler"] == rows[-1]["meddler/total"]
    assert store.tag(2) in [path.name for path in store.folder(runs.folder / f"whole-{stage}").iterdir()]
    plain, skipped, halved = (runs.weights(f"{name}-{stage}") for name in ("plain", "skipped", "halved"))
    assert all(torch.equal(plain[key], skipped[key]) for key in plain)
    # SGD without clipping: the update is the rate times the gradient, whose norm is that before it was halved.
    moved = sum(float((halved[key] - skipped[key]).double().square().sum()) for key in plain) ** 0.5
    assert moved == pytest.approx(0.5 * 0.2 * rows[3]["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("stage", STAGES)
def test_its_state_is_resumed_to_the_bit(runs: Workshop, stage: int):
    assert exact(runs.folder / f"cut-{stage}") == exact(runs.folder / f"whole-{stage}")
    whole, cut = runs.weights(f"whole-{stage}"), runs.weights(f"cut-{stage}")
    assert all(torch.equal(whole[key], cut[key]) for key in whole)
