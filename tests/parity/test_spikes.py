"""Steps whose loss leaps: left out, or undone with the data that led there, at every stage and after a resume."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from parity.test_ladder import PROGRAM, STAGES, Workshop, exact, monkeypatch_module, workshop  # noqa: F401 (fixtures)
from support.ranks import run_ranks

GUARD = [
    "trainer.spike.window=8",
    "trainer.spike.z_score=20",
    "data.packing=false",
    "optimizer=adamw",
    "optimizer.lr=1e-3",
]


def test_a_skipped_update_leaves_the_weights_as_they_were(workshop: Workshop):  # noqa: F811
    """The last step leaps and is skipped: the weights are those of a run that is one step shorter, to the bit."""
    cases: list[dict[str, Any]] = []
    kinds = [(f"s{stage}-fp32", stage, "fp32") for stage in STAGES] + [("s1-bf16", 1, "bf16"), ("s3-bf16", 3, "bf16")]
    for name, stage, precision in kinds:
        common = [f"zero=stage{stage}", f"trainer.precision={precision}", *GUARD]
        cases.append(workshop.case(f"{name}-shorter", *common, "trainer.max_steps=7"))
        leaps = workshop.case(f"{name}-leaps", *common, "trainer.max_steps=8", "trainer.spike.action=skip")
        cases.append({**leaps, "leap": [7, 30.0]})
    run_ranks(PROGRAM, 2, cases)
    for name, _, _ in kinds:
        row = workshop.rows(f"{name}-leaps")[-1]
        assert (row["step"], row["skipped"], row["grad_norm"]) == (8, "spike", None), name
        ended = workshop.result(f"{name}-leaps")
        assert ended["spikes"]["skipped"] == 1
        assert ended["nonfinite_steps"] == 0
        shorter, leaps = workshop.weights(f"{name}-shorter"), workshop.weights(f"{name}-leaps")
        assert all(torch.equal(shorter[key], leaps[key]) for key in shorter), name


@pytest.mark.ci
def test_a_rollback_goes_on_from_the_checkpoint_with_the_data_behind_the_spike(workshop: Workshop):  # noqa: F811
    guard = [*GUARD, "trainer.spike.action=rollback", "checkpoint.every=3", "schedule=constant"]
    whole, parts, ends = [], [], []
    for stage in (0, 2, 3):
        common = [f"zero=stage{stage}", *guard]
        name = f"back-{stage}"
        leap = {"leap": [7, 30.0]}
        whole.append({**workshop.case(f"{name}-whole", *common, "trainer.max_steps=11"), **leap})
        parts.append({**workshop.case(f"{name}-part", *common, "trainer.max_steps=9"), **leap})
        ends.append(workshop.case(f"{name}-end", *common, "trainer.max_steps=11", directory=f"{name}-part"))
    run_ranks(PROGRAM, 2, [*whole, *parts, *ends])
    for stage in (0, 2, 3):
        name = f"back-{stage}"
        rows = workshop.rows(f"{name}-whole")
        assert [row["step"] for row in rows] == list(range(1, 12))
        window = rows[0]["epoch"]
        # Windows 6 and 7 are left out: step 7 has the ninth window.
        passed = [round(row["epoch"] / window) for row in rows[:8]]
        assert passed == [1, 2, 3, 4, 5, 6, 9, 10], passed
        [event] = workshop.result(f"{name}-whole")["spikes"]["events"]
        assert (event["step"], event["action"]) == (8, "rolled back")
        assert steps_of(workshop, f"{name}-part") == steps_of(workshop, f"{name}-whole")
        whole_weights, part_weights = workshop.weights(f"{name}-whole"), workshop.weights(f"{name}-part")
        assert all(torch.equal(whole_weights[key], part_weights[key]) for key in whole_weights), name


def steps_of(workshop: Workshop, name: str) -> list[dict[str, Any]]:  # noqa: F811
    """The exact rows of the steps; the end of the shorter run is evaluated beside them."""
    return [row for row in exact(workshop.folder / name) if "loss" in row]
