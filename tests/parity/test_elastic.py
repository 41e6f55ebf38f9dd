"""A run goes on at another number of ranks and another ZeRO stage: nothing of it changes, and the curve goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from parity.test_ladder import PROGRAM, Workshop, monkeypatch_module, workshop  # noqa: F401 (fixtures)
from support.ranks import run_ranks

from dstune.checkpoint import store
from dstune.checkpoint.shards import Shards

RESTORE = Path(__file__).with_name("restore_cases.py")
ADAMW = ["optimizer=adamw", "optimizer.lr=1e-2", "optimizer.weight_decay=0.1", "schedule=cosine", "data.packing=false"]
ONE_STEP = "run.time_limit=0.000001"  # over after the first step of each launch

LAYOUTS = [(2, "stage3"), (1, "stage2"), (3, "stage3_offload"), (4, "stage1"), (2, "stage0")]
"""(ranks, zero) of each of the five steps: 2 -> 1 -> 3 -> 4 -> 2 ranks, ZeRO 3 -> 2 -> 3 with offload -> 1 -> 0."""


METHODS = ("full", "lora")


@pytest.mark.ci
def test_a_run_that_moves_at_every_step_has_the_curve_of_one_that_stays(workshop: Workshop):  # noqa: F811
    common = [*ADAMW, "evaluate.every=2"]
    run_ranks(PROGRAM, 2, [workshop.case(f"stays-{m}", f"method={m}", "zero=stage2", *common) for m in METHODS])
    for step, (ranks, zero) in enumerate(LAYOUTS, start=1):
        cases = []
        for method in METHODS:
            overrides = [f"method={method}", f"zero={zero}", *common, ONE_STEP]
            cases.append(workshop.case(f"moves-{method}-{step}", *overrides, directory=f"moves-{method}"))
        run_ranks(PROGRAM, ranks, cases)
    for method in METHODS:
        assert workshop.result(f"moves-{method}")["steps"] == 5
        stays, moves = workshop.rows(f"stays-{method}"), workshop.rows(f"moves-{method}")
        assert [row["step"] for row in moves] == [1, 2, 3, 4, 5]
        assert [row["loss"] for row in moves] == pytest.approx([row["loss"] for row in stays], rel=1e-5)
        assert [row["grad_norm"] for row in moves] == pytest.approx([row["grad_norm"] for row in stays], rel=1e-4)


OTHERWISE = {"stage2": "round_robin_gradients: true", "stage3": "sub_group_size: 700"}
"""What lays out the shards of a stage in another order, on as many ranks."""


@pytest.mark.ci
def test_shards_in_another_order_have_the_curve_of_a_run_that_stays(workshop: Workshop):  # noqa: F811
    for step in range(2):
        cases = []
        for zero, words in OTHERWISE.items():
            settings = "zero.settings={zero_optimization: {" + words + "}}"
            for name, more in (("same", []), ("other", [settings] * step)):
                name = f"{name}-order-{zero}"
                overrides = [*ADAMW, f"zero={zero}", f"trainer.max_steps={2 + 2 * step}", *more]
                cases.append(workshop.case(f"{name}-{step}", *overrides, directory=name))
        run_ranks(PROGRAM, 2, cases)
    for zero in OTHERWISE:
        same, other = workshop.rows(f"same-order-{zero}"), workshop.rows(f"other-order-{zero}")
        assert [row["step"] for row in other] == [1, 2, 3, 4]
        assert [row["loss"] for row in other] == pytest.approx([row["loss"] for row in same], rel=1e-5)


CHAIN = {3: (1, 3, 2, 0), 1: (3, 1, 0, 2), 2: (0, 3, 1, 2)}
"""Stages that follow each other, by number of ranks; the origin is stage 3 on 2 ranks. bf16 has no stage 0."""


@pytest.mark.ci
def test_every_layout_takes_over_every_other_to_the_bit(workshop: Workshop):  # noqa: F811
    """Weights, both moments and the counter, through a chain of layouts in fp32 and bf16."""
    kinds = [(precision, method) for precision in ("fp32", "bf16") for method in METHODS]
    overrides = {
        kind: [f"trainer.precision={kind[0]}", f"method={kind[1]}", *ADAMW, "run.export=none"] for kind in kinds
    }
    names = {kind: "-".join(("origin", *kind)) for kind in kinds}
    origins = [workshop.case(names[kind], "zero=stage3", *overrides[kind], "trainer.max_steps=2") for kind in kinds]
    run_ranks(PROGRAM, 2, origins)
    newest = {kind: store.newest(workshop.folder / names[kind]) for kind in kinds}
    taken: dict[tuple[str, str], list[Path]] = {kind: [path] for kind, path in newest.items() if path is not None}
    for size, stages in CHAIN.items():
        cases = []
        for kind in kinds:
            for stage in stages:
                if stage == 0 and kind[0] == "bf16":
                    continue
                name = f"{names[kind]}-{size}-{stage}"
                case = workshop.case(name, f"zero=stage{stage}", *overrides[kind])
                target = workshop.folder / name / "taken"
                cases.append({**case, "from": str(taken[kind][-1]), "to": str(target)})
                taken[kind].append(target)
        run_ranks(RESTORE, size, cases)
    for paths in taken.values():
        for path in paths[1:]:
            assert_equal(Shards(paths[0]), Shards(path))


def assert_equal(left: Shards, right: Shards) -> None:
    names = left.shapes.keys() & right.shapes.keys()
    assert len(names) > 4
    for name in names:
        assert left.shapes[name] == right.shapes[name]
        assert set(left.kinds(name)) == set(right.kinds(name)) == {"exp_avg", "exp_avg_sq"}
        for kind in ("weight", "exp_avg", "exp_avg_sq"):
            assert torch.equal(left.read(name, kind), right.read(name, kind)), f"{name}: {kind}"
        assert float(left.scalars(name)["step"]) == float(right.scalars(name)["step"]) == 2
    for name, buffer in left.buffers.items():
        assert torch.equal(buffer, right.buffers[name])
