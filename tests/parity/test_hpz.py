"""Copies of the weights in each node (hpZ): the plain loop's losses and weights, those without copies to the bit, kills and moves.

Four ranks take themselves for two nodes of two.
"""

from __future__ import annotations

import pytest
import torch
from parity.reference import train_plainly
from parity.test_ladder import PROGRAM, Workshop, equal_the_plain_loop, exact
from safetensors.torch import load_file
from support.ranks import run_ranks

pytestmark = [pytest.mark.ci, pytest.mark.timeout(1200)]  # four ranks on two cores

THRESHOLDS = {"none": 0, "some": 3000}
"""Persistence thresholds of stage 3: none of the tiny model's tensors is complete on every rank, or norms and small ones are."""
METHODS = ("full", "lora")
ADAMW = ["optimizer=adamw", "optimizer.lr=1e-2", "schedule=cosine", "data.packing=false"]
ONE_STEP = "run.time_limit=0.000001"


@pytest.fixture(scope="module")
def workshop(tmp_path_factory) -> Workshop:
    folder = tmp_path_factory.mktemp("hpz")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DSTUNE_CACHE", str(folder / "cache"))
        yield Workshop(folder)


def stage3(threshold: int, *, hpz: bool) -> list[str]:
    return ["zero=stage3", f"zero.param_persistence_threshold={threshold}", f"zero.hpz={str(hpz).lower()}"]


def weights(workshop: Workshop, name: str) -> dict[str, torch.Tensor]:
    paths = sorted((workshop.folder / name / "export").glob("*.safetensors"))
    return {key: value for path in paths for key, value in load_file(path).items()}


def assert_same(workshop: Workshop, left: str, right: str) -> None:
    assert exact(workshop.folder / left) == exact(workshop.folder / right)
    expected, actual = weights(workshop, left), weights(workshop, right)
    assert len(expected) > 1
    assert all(torch.equal(expected[key], actual[key]) for key in expected), f"{left}, {right}"


def test_copies_change_no_bit_and_equal_the_plain_loop(workshop):
    plain = train_plainly(workshop.composed("plain", "data.packing=false").config, workshop.folder / "cache")
    cases, pairs = [], []
    kinds = [("full", "fp32", name) for name in THRESHOLDS]
    kinds += [("lora", "fp32", "some"), ("full", "bf16", "some")]
    for method, precision, name in kinds:
        for hpz in (False, True):
            run = f"{method}-{precision}-{name}-{hpz}"
            more = [f"method={method}", f"trainer.precision={precision}", "data.packing=false", "evaluate.every=2"]
            cases.append(workshop.case(run, *stage3(THRESHOLDS[name], hpz=hpz), *more))
        pairs.append((f"{method}-{precision}-{name}-False", f"{method}-{precision}-{name}-True"))
    run_ranks(PROGRAM, 4, cases, per_node=2)
    for name in THRESHOLDS:
        run = f"full-fp32-{name}-True"
        equal_the_plain_loop(workshop, {"plain": plain}, {run: ("plain", [])})
    for without, with_copies in pairs:
        assert_same(workshop, without, with_copies)


def adamw_run(method: str) -> list[str]:
    return [f"method={method}", *ADAMW, "evaluate.every=2"]


def test_a_stopped_run_continues_to_the_bit_with_and_without_copies(workshop):
    """Stopped after each step; with copies throughout, and with and without them by turns."""
    steps: list[list[dict[str, str]]] = [[], [], []]
    with_copies, without = stage3(3000, hpz=True), stage3(3000, hpz=False)
    for method in METHODS:
        steps[0].append(workshop.case(f"{method}-whole", *with_copies, *adamw_run(method)))
        for kind, turns in (("stays", [with_copies] * 3), ("turns", [without, with_copies, without])):
            for number, (zero, limit) in enumerate(zip(turns, ([ONE_STEP], [ONE_STEP], []), strict=True)):
                case = workshop.case(
                    f"{method}-{kind}-{number}", *zero, *adamw_run(method), *limit, directory=f"{method}-{kind}"
                )
                steps[number].append(case)
    for cases in steps:
        run_ranks(PROGRAM, 4, cases, per_node=2)
    for method in METHODS:
        for kind in ("stays", "turns"):
            assert_same(workshop, f"{method}-whole", f"{method}-{kind}")


LAYOUTS = [(4, stage3(0, hpz=True)), (2, ["zero=stage1"]), (4, stage3(3000, hpz=True))]
"""Ranks, at most two on a node, and the stage of each stop."""


def test_a_run_goes_on_in_another_layout_and_back(workshop):
    run_ranks(PROGRAM, 2, [workshop.case(f"{m}-there", "zero=stage2", *adamw_run(m)) for m in METHODS])
    for number, (ranks, zero) in enumerate(LAYOUTS):
        limit = [] if number == len(LAYOUTS) - 1 else [ONE_STEP]
        cases = [
            workshop.case(f"{m}-moves-{number}", *zero, *adamw_run(m), *limit, directory=f"{m}-moves") for m in METHODS
        ]
        run_ranks(PROGRAM, ranks, cases, per_node=2)
    for method in METHODS:
        stays, moves = workshop.rows(f"{method}-there"), workshop.rows(f"{method}-moves")
        assert [row["step"] for row in moves] == [1, 2, 3, 4, 5]
        assert [row["loss"] for row in moves] == pytest.approx([row["loss"] for row in stays], rel=1e-5)
