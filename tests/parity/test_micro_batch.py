"""Measuring the size of a micro-batch leaves no trace: the run is that with the number given, to the bit."""

from __future__ import annotations

import json
from typing import Any

import torch
from parity.test_ladder import PROGRAM, STAGES, Workshop, exact, monkeypatch_module, workshop  # noqa: F401 (fixtures)
from support.ranks import run_ranks

AUTO = "trainer.micro_batch_size=auto"
COMMON = ["optimizer=adamw", "optimizer.lr=1e-3", "trainer.max_steps=3", "data.packing=false"]


def test_a_measured_size_gives_the_run_of_that_size(workshop: Workshop):  # noqa: F811
    """With dropout, at every stage, and in bf16 where sums of gradients are kept apart."""
    kinds = [(f"s{stage}", [f"zero=stage{stage}"]) for stage in STAGES]
    kinds += [("s2-bf16", ["zero=stage2", "trainer.precision=bf16"]), ("packed", ["zero=stage3", "data.packing=true"])]
    cases: list[dict[str, Any]] = []
    for name, overrides in kinds:
        # Whatever the times are, the largest size is taken: five rows, half of the window.
        cases.append({**workshop.case(f"{name}-auto", *COMMON, *overrides, AUTO), "gain": 0.0})
        cases.append(workshop.case(f"{name}-given", *COMMON, *overrides, "trainer.micro_batch_size=5"))
    run_ranks(PROGRAM, 2, cases)
    for name, _ in kinds:
        found = workshop.result(f"{name}-auto")["micro_batch"]
        assert (found["rows"], found["world_size"]) == (5, 2), name
        assert [trial["rows"] for trial in found["trials"]] == [1, 2, 4, 5]
        assert all(trial["gib"] > 0 and trial["rows_per_second"] > 0 for trial in found["trials"])
        assert exact(workshop.folder / f"{name}-auto") == exact(workshop.folder / f"{name}-given"), name
        measured, given = workshop.weights(f"{name}-auto"), workshop.weights(f"{name}-given")
        assert all(torch.equal(measured[key], given[key]) for key in given), name


def test_a_continued_run_keeps_its_size_and_measures_on_other_ranks(workshop: Workshop):  # noqa: F811
    common = [*COMMON, "zero=stage2", AUTO]
    cut = {**workshop.case("kept", *common, "run.time_limit=0.000001"), "gain": 0.0}
    # With times that ask for single rows: what was found before is kept all the same.
    end = {**workshop.case("kept-end", *common, directory="kept"), "gain": 1e9}
    run_ranks(PROGRAM, 2, [cut, end])
    found = workshop.result("kept")["micro_batch"]
    assert (found["rows"], found["world_size"]) == (5, 2)
    longer = [*common, "trainer.max_steps=4"]
    run_ranks(PROGRAM, 1, [{**workshop.case("kept-alone", *longer, directory="kept"), "gain": 1e9}])
    found = workshop.result("kept")["micro_batch"]
    assert (found["rows"], found["world_size"]) == (1, 1)
    steps = [json.loads(line)["step"] for line in (workshop.folder / "kept" / "metrics.jsonl").read_text().splitlines()]
    assert steps[-1] == 4
