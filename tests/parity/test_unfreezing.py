"""Gradual unfreezing at ZeRO 0 to 3: nothing moves before its time, what begins learns at once, resumed to the bit."""

from __future__ import annotations

import pytest
import torch
from parity.test_ladder import PROGRAM, STAGES, Workshop, exact, monkeypatch_module, workshop  # noqa: F401 (fixtures)
from safetensors.torch import load_file
from support.ranks import run_ranks

from dstune.checkpoint import store
from dstune.checkpoint.shards import Shards

LR, FACTOR = 1e-3, 2.0
COMMON = [
    "method=ulmfit",
    f"method.rate_factor={FACTOR}",
    "method.unfreeze_steps=1",
    "optimizer=adamw",
    f"optimizer.lr={LR}",
    "optimizer.weight_decay=0.1",
    "data.packing=false",
    "trainer.max_steps=5",
    "schedule=constant",
    "data.split.validation=0",
]
PARTS = [("model.norm", "lm_head"), ("layers.1.",), ("layers.0.",), ("embed_tokens",)]
"""From the top down; part k begins with step k + 1."""


@pytest.fixture(scope="module")
def runs(workshop: Workshop) -> Workshop:  # noqa: F811
    whole, cut, end = [], [], []
    for stage in STAGES:
        overrides = [*COMMON, f"zero=stage{stage}"]
        whole.append(workshop.case(f"whole-{stage}", *overrides, "checkpoint.every=1", "checkpoint.keep=20"))
        limit = "run.time_limit=0.000001"  # over after the first step of each launch
        cut.append(workshop.case(f"cut-{stage}", *overrides, limit, directory=f"cut-{stage}"))
        end.append(workshop.case(f"end-{stage}", *overrides, directory=f"cut-{stage}"))
    # Two steps: the second part has made its first one, the third begins with the next. One run goes on at another stage.
    moved = workshop.case("moved", *COMMON, "zero=stage0", directory="moved")
    from_3 = workshop.case("moved-3", *COMMON, "zero=stage3", limit, directory="moved")
    run_ranks(PROGRAM, 2, [*whole, *cut, *cut, from_3, from_3])
    run_ranks(PROGRAM, 2, [*end, moved])
    return workshop


@pytest.mark.parametrize("stage", STAGES)
def test_parts_move_from_their_first_step_on_and_not_by_a_bit_before(runs: Workshop, stage: int):
    before = load_file(runs.model / "model.safetensors")
    for step in range(1, 6):
        saved = Shards(store.folder(runs.folder / f"whole-{stage}") / store.tag(step))
        after = {name: saved.read(name).view(shape) for name, shape in saved.shapes.items()}
        assert after.keys() == before.keys()
        for number, part in enumerate(PARTS):
            names = [name for name in after if any(marker in name for marker in part)]
            assert names
            for name in names:
                still = torch.equal(after[name], before[name])
                assert still is (step <= number), f"step {step}: {name}"
            if step == number + 1:
                # AdamW's first step is the rate itself, whatever the gradient: its counter begins with the part.
                rate = LR / FACTOR**number
                moved = max(float((after[name] - before[name]).abs().max()) for name in names)
                assert moved == pytest.approx(rate, rel=0.15), f"stage {stage}, part {number}"
        before = {
            name: (after[name] if any(marker in name for part in PARTS[:step] for marker in part) else weight)
            for name, weight in before.items()
        }


def test_all_stages_agree(runs: Workshop):
    rows = {stage: runs.rows(f"whole-{stage}") for stage in STAGES}
    assert [row["trained_layers"] for row in rows[0]] == [1, 2, 3, 4, 4]
    for stage in STAGES[1:]:
        for key in ("loss", "grad_norm"):
            expected = [row[key] for row in rows[0]]
            assert [row[key] for row in rows[stage]] == pytest.approx(expected, rel=1e-4), (stage, key)


@pytest.mark.parametrize("stage", STAGES)
def test_resumed_in_the_middle_equals_uninterrupted_to_the_bit(runs: Workshop, stage: int):
    assert exact(runs.folder / f"cut-{stage}") == exact(runs.folder / f"whole-{stage}")
    left, right = runs.weights(f"cut-{stage}"), runs.weights(f"whole-{stage}")
    assert left.keys() == right.keys() and left
    assert all(torch.equal(left[key], right[key]) for key in left)


def test_resumed_at_another_stage_goes_on_with_the_curve(runs: Workshop):
    expected, found = runs.rows("whole-0"), runs.rows("moved")
    assert [row["step"] for row in found] == list(range(1, 6))
    assert [row["loss"] for row in found] == pytest.approx([row["loss"] for row in expected], rel=1e-5)
