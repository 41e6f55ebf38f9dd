"""Ranks that share weights train as ranks with whole ones: the plain loop's losses, gradient norms and weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from parity.reference import train_plainly
from parity.test_ladder import PROGRAM, Workshop, exact, monkeypatch_module, workshop  # noqa: F401 (fixtures)
from safetensors.torch import load_file
from support.ranks import run_ranks

from dstune.checkpoint.export import export_checkpoint
from dstune.zero.safe_load import load
from dstune.zero.slices import CUTS

SLICES_PROGRAM = Path(__file__).with_name("slices_ranks.py")
TENSOR = ["parallel=tensor", "model.config_overrides={attention_dropout:0.0}"]
"""Without dropout, whose random numbers belong to the heads of a rank."""
STILL = "model.config_overrides={attention_dropout:0.0}"
STAGES = (0, 1, 2)


@pytest.fixture(scope="module")
def references(workshop: Workshop):  # noqa: F811
    return {
        value: train_plainly(
            workshop.composed("reference", f"data.packing={value}", STILL).config, workshop.folder / "cache"
        )
        for value in ("false", "true")
    }


def compare_with_the_plain_loop(workshop, references, ranks: int, size: int, stages, sharing: list[str]) -> None:  # noqa: F811
    """Groups of `size` of `ranks` that share rows or weights, packed and padded, at each stage."""
    names = {}
    for stage in stages:
        for packing in ("true", "false"):
            overrides = [f"zero=stage{stage}", f"data.packing={packing}", *sharing, f"parallel.size={size}"]
            names[f"{ranks}-{size}-s{stage}-{packing}"] = (packing, overrides)
    run_ranks(PROGRAM, ranks, [workshop.case(name, *overrides) for name, (_, overrides) in names.items()])
    for name, (packing, _) in names.items():
        expected = references[packing]
        rows = workshop.rows(name)
        assert [row["loss"] for row in rows] == pytest.approx(expected.losses, rel=2e-6), name
        assert [row["grad_norm"] for row in rows] == pytest.approx(expected.grad_norms, rel=2e-6), name
        trained = workshop.weights(name)
        for key, weight in expected.weights.items():
            assert trained[key].shape == weight.shape
            assert (trained[key] - weight).abs().max() < 2e-6, f"{name}: {key}"


@pytest.fixture(scope="module")
def gradients() -> list[dict[str, list]]:
    return [json.loads(output.splitlines()[-1]) for output in run_ranks(SLICES_PROGRAM, 2, [2])]


def test_gradients_of_slices_are_slices_of_gradients(gradients):
    """Each kind of model, with biases, tied, with activations computed again, in pieces, with adapters, in float64. Norms of heads
    sum their weight's gradient in fp32, as all norms do: there the ranks' sum of sums is 2e-7 away, elsewhere 2e-15."""
    for of_rank in gradients:
        for name, (gradient, loss, norm, _, cut, _) in of_rank.items():
            rounding = 1e-6 if name in ("gemma3_text", "qwen3", "checkpointing", "selective") else 1e-13
            assert gradient < rounding and loss < 1e-13 and norm < rounding, name
            assert cut >= 14, name


def test_what_is_whole_on_every_rank_has_the_same_gradient_on_each_to_the_bit(gradients):
    assert all(equal for of_rank in gradients for _, _, _, equal, _, _ in of_rank.values())


def test_ranks_sum_as_many_bytes_as_the_plan_says(gradients):
    """Two layers, 2 rows of 12 positions, 32 values wide, in float64: four sums in a layer, five where it is computed again."""
    of_sum = 2 * 12 * 32 * 8
    for of_rank in gradients:
        assert of_rank["llama"][5] == of_rank["tiles"][5] == 2 * 4 * of_sum
        assert of_rank["checkpointing"][5] == of_rank["selective"][5] == 2 * 5 * of_sum


@pytest.mark.parametrize(
    ("ranks", "size", "stages"), [(2, 2, STAGES), pytest.param(4, 2, STAGES, marks=pytest.mark.ci)]
)
def test_shared_weights_equal_the_plain_loop(workshop, references, ranks, size, stages):  # noqa: F811
    compare_with_the_plain_loop(workshop, references, ranks, size, stages, TENSOR)


def test_clipping_evaluation_lora_and_samples(workshop):  # noqa: F811
    """What goes through other code than a plain step: the norm that clips, held-out losses of rows and of slices of the data,
    adapters with activations computed again, answers, in bf16 too; against one rank."""
    told_apart = workshop.folder / "told_apart.jsonl"
    rows = [json.loads(line) for line in workshop.data.read_text().splitlines()]
    told_apart.write_text("\n".join(json.dumps(row | {"kind": "ab"[n % 2]}) for n, row in enumerate(rows)))
    cases = {
        "clip-0": ["zero=stage0", "trainer.grad_clip=0.5"],
        "clip-2": ["zero=stage2", "trainer.grad_clip=0.5", f"data.train={told_apart}", "evaluate.slices=[kind]"],
        "lora": ["method=lora", "zero=stage2", "trainer.activation_checkpointing=true", "optimizer.lr=2"],
        "bf16-1": ["zero=stage1", "trainer.precision=bf16", "trainer.grad_clip=0.5"],
        "bf16-2": ["zero=stage2", "trainer.precision=bf16"],
    }
    common = [STILL, "evaluate.at_start=true", "evaluate.samples=2", "evaluate.max_new_tokens=4", "trainer.max_steps=3"]
    plain = [workshop.case(f"plain-{name}", *common, *overrides) for name, overrides in cases.items()]
    run_ranks(PROGRAM, 1, plain)
    shared = [workshop.case(f"shared-{name}", *common, *overrides, *TENSOR) for name, overrides in cases.items()]
    run_ranks(PROGRAM, 2, shared)
    for name in cases:
        near = 2e-2 if name.startswith("bf16") else 1e-5
        one, two = (workshop.result(f"{kind}-{name}") for kind in ("plain", "shared"))
        for when in ("eval_initial", "eval_final"):
            assert two[when]["targets"] == one[when]["targets"]
            assert two[when]["loss"] == pytest.approx(one[when]["loss"], rel=near), name
        assert two["tokens"] == one["tokens"]
        models = [
            json.loads((workshop.folder / f"{kind}-{name}" / "environment.json").read_text())["model"]
            for kind in ("plain", "shared")
        ]
        assert models[0]["parameters"] == models[1]["parameters"] and models[0]["trained"] == models[1]["trained"]
        assert two.get("slices", {}).keys() == one.get("slices", {}).keys()
        for value, metrics in two["slices"]["kind"]["values"].items() if name == "clip-2" else ():
            assert metrics == pytest.approx(one["slices"]["kind"]["values"][value], rel=near), value
        for key in ("loss", "grad_norm"):
            values = [[row[key] for row in workshop.rows(f"{kind}-{name}")] for kind in ("plain", "shared")]
            assert values[1] == pytest.approx(values[0], rel=near), (name, key)
            assert abs(values[0][2] - values[0][0]) > 1e-3, "three steps change it"
        file = "adapter_model.safetensors" if name == "lora" else "model.safetensors"
        left, right = (load_file(workshop.folder / f"{kind}-{name}" / "export" / file) for kind in ("plain", "shared"))
        assert left.keys() == right.keys() and left
        if not name.startswith("bf16"):
            assert all((left[key] - right[key]).abs().max() < 5e-6 for key in left), name
            answers = [
                (workshop.folder / f"{kind}-{name}" / "samples.jsonl").read_text() for kind in ("plain", "shared")
            ]
            assert answers[0] == answers[1] and answers[0]


def test_resumed_equals_uninterrupted_to_the_bit(workshop):  # noqa: F811
    """Stopped after the first step, then finished: metrics and weights of an undisturbed run, dropout included. What is whole
    on both ranks of a group is the same on both."""
    common = ["parallel=tensor", "optimizer=adamw", "optimizer.lr=1e-2", "schedule=cosine", "evaluate.every=2"]
    common += ["trainer.max_steps=3"]
    limit = "run.time_limit=0.000001"
    ways = {f"s{stage}": [f"zero=stage{stage}"] for stage in STAGES}
    ways["s1"].append("checkpoint.mode=async")
    ways["lora"] = ["zero=stage2", "method=lora", "method.dropout=0.1"]
    cases = []
    for name, way in ways.items():
        cases += [
            workshop.case(f"{name}-whole", *common, *way),
            workshop.case(f"{name}-cut", *common, *way, limit, directory=f"{name}-cut"),
            workshop.case(f"{name}-end", *common, *way, directory=f"{name}-cut"),
        ]
    run_ranks(PROGRAM, 2, cases)
    for name in ways:
        assert exact(workshop.folder / f"{name}-cut") == exact(workshop.folder / f"{name}-whole")
        file = "adapter_model.safetensors" if name == "lora" else "model.safetensors"
        left, right = (load_file(workshop.folder / f"{name}-{kind}" / "export" / file) for kind in ("whole", "cut"))
        assert left and all(torch.equal(left[key], right[key]) for key in left)
        (checkpoint,) = (workshop.folder / f"{name}-whole" / "checkpoints").glob("step-*3")
        states = [load(checkpoint / f"mp_rank_0{part}_model_states.pt") for part in range(2)]
        one, other = (state["module"] for state in states)
        whole = [key for key in one if key not in states[0][CUTS]]
        assert len(whole) == (14 if name == "lora" else 7)
        assert all(torch.equal(one[key], other[key]) for key in whole), name


def test_two_groups_stop_and_go_on_as_two_and_as_one(workshop):  # noqa: F811
    """Four ranks, two on each weight, stopped after the first step: finished by four to the bit, and by two as near as another
    order of sums."""
    common = [*TENSOR, "parallel.size=2", "zero=stage2", "optimizer=adamw", "optimizer.lr=1e-2", "trainer.max_steps=3"]
    limit = "run.time_limit=0.000001"
    cases = [
        workshop.case("groups-whole", *common),
        workshop.case("groups-cut", *common, limit, directory="groups-cut"),
        workshop.case("groups-end", *common, directory="groups-cut"),
        workshop.case("group-cut", *common, limit, directory="group-cut"),
    ]
    run_ranks(PROGRAM, 4, cases)
    assert exact(workshop.folder / "groups-cut") == exact(workshop.folder / "groups-whole")
    assert [row["step"] for row in workshop.rows("group-cut")] == [1]
    run_ranks(PROGRAM, 2, [workshop.case("group-end", *common, directory="group-cut")])
    whole, fewer = workshop.rows("groups-whole"), workshop.rows("group-cut")
    assert [row["step"] for row in fewer] == [1, 2, 3]
    assert [row["loss"] for row in fewer] == pytest.approx([row["loss"] for row in whole], rel=1e-5)
    left, right = workshop.weights("groups-whole"), workshop.weights("group-cut")
    assert left.keys() == right.keys() and all((left[key] - right[key]).abs().max() < 1e-5 for key in left)


def test_a_run_goes_on_with_shared_weights_and_without_them(workshop):  # noqa: F811
    """With two ranks on each weight, then at another stage, then with whole weights, then shared again: as with whole ones."""
    limit = "run.time_limit=0.000001"
    common = ["optimizer=adamw", "optimizer.lr=1e-2", "schedule=cosine", STILL, "trainer.max_steps=5"]
    ways = [
        ["zero=stage2", "parallel=tensor"],
        ["zero=stage0", "parallel=tensor"],
        ["zero=stage3"],
        ["zero=stage1", "parallel=tensor"],
    ]
    moved = [workshop.case(f"moved-{n}", *common, *way, limit, directory="moved") for n, way in enumerate(ways)]
    moved.append(workshop.case("moved-end", *common, "zero=stage2", directory="moved"))
    run_ranks(PROGRAM, 2, [*moved, workshop.case("stays", *common, "zero=stage2")])
    moved_rows, stays = (workshop.rows(name) for name in ("moved", "stays"))
    assert [row["step"] for row in moved_rows] == [1, 2, 3, 4, 5]
    assert [row["loss"] for row in moved_rows] == pytest.approx([row["loss"] for row in stays], rel=1e-5)


def test_weights_alone_are_saved_and_exported(workshop):  # noqa: F811
    """`checkpoint.weights_only`, and `dstune export` of it: the weights that the run's own export has, and the logits of the
    model in plain transformers."""
    from transformers import AutoModelForCausalLM

    common = [*TENSOR, "trainer.max_steps=2", "checkpoint.weights_only=true"]
    cases = [workshop.case(f"w{stage}", *common, f"zero=stage{stage}") for stage in STAGES]
    run_ranks(PROGRAM, 2, cases)
    losses: list[float] = []
    for stage in STAGES:
        run_dir = workshop.folder / f"w{stage}"
        (checkpoint,) = (run_dir / "checkpoints").glob("step-*2")
        out = export_checkpoint(run_dir, checkpoint, workshop.folder / f"w{stage}-exported")
        left, right = load_file(out / "model.safetensors"), workshop.weights(f"w{stage}")
        assert all(torch.equal(left[key], right[key]) for key in left)
        model = AutoModelForCausalLM.from_pretrained(out)
        ids = torch.arange(20)[None]
        with torch.no_grad():
            losses.append(float(model(input_ids=ids, labels=ids).loss))
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)
