"""A save in the background, and one of weights alone, hold what a save holds, at every stage."""

from __future__ import annotations

import json

import torch
from parity.test_ladder import PROGRAM, Workshop, exact, monkeypatch_module, workshop  # noqa: F401 (fixtures)
from support.ranks import run_ranks
from support.tiny import save_decoder

from dstune.checkpoint import store
from dstune.checkpoint.shards import Shards
from dstune.zero.safe_load import load

KINDS = {"sync": [], "async": ["checkpoint.mode=async"], "weights": ["checkpoint.weights_only=true"]}
KINDS["both"] = [*KINDS["async"], *KINDS["weights"]]


def test_every_way_to_save_holds_the_same(workshop: Workshop):  # noqa: F811
    cases, names = [], [(0, "full"), (2, "lora"), (3, "full")]  # whole states, states in parts, weights in parts
    for stage, method in names:
        common = [
            f"zero=stage{stage}",
            f"method={method}",
            "optimizer=adamw",
            "optimizer.lr=1e-2",
            "data.packing=false",
        ]
        common += ["checkpoint.every=1", "checkpoint.keep=9", "trainer.max_steps=3", "evaluate.every=2"]
        for kind, overrides in KINDS.items():
            cases.append(workshop.case(f"{kind}-{method}-{stage}", *common, *overrides))
    run_ranks(PROGRAM, 2, cases)
    for stage, method in names:
        runs = {kind: workshop.folder / f"{kind}-{method}-{stage}" for kind in KINDS}
        saved = {kind: [info.path for info in store.listing(run) if info.committed] for kind, run in runs.items()}
        sizes = {kind: sum(info.bytes for info in store.listing(run)) for kind, run in runs.items()}
        for kind, run in runs.items():
            assert exact(run) == exact(runs["sync"])
            assert [path.name for path in saved[kind]] == [store.tag(step) for step in (1, 2, 3)]
            assert not any(store.damaged_files(path) for path in saved[kind])
            assert not list((run / "checkpoints").rglob("*.written"))
            for path, expected in zip(saved[kind], saved["sync"], strict=True):
                same(Shards(expected), Shards(path), states=kind == "async")
            only = kind in ("weights", "both")
            assert (store.resumable(run) is None) == only
            assert all(json.loads((path / "state.json").read_text())["weights_only"] == only for path in saved[kind])
            file = "adapter_model.safetensors" if method == "lora" else "model.safetensors"
            assert (run / "export" / file).read_bytes() == (runs["sync"] / "export" / file).read_bytes()
        assert sizes["weights"] < sizes["sync"]


def test_a_frozen_vocabulary_is_in_no_save_under_its_other_name(workshop: Workshop):  # noqa: F811
    tied = f"model.path={save_decoder(workshop.folder / 'tied', tied=True)}"
    common = [tied, "zero=stage2", "method=lora", "optimizer=adamw", "data.packing=false"]
    cut = workshop.case("tied-cut", *common, "trainer.max_steps=3", "run.time_limit=0.000001")
    whole = workshop.case("tied-whole", *common, "trainer.max_steps=3")
    run_ranks(PROGRAM, 2, [cut, workshop.case("tied-end", *common, "trainer.max_steps=3", directory="tied-cut"), whole])
    assert exact(workshop.folder / "tied-cut") == exact(workshop.folder / "tied-whole")
    newest = store.newest(workshop.folder / "tied-cut")
    assert newest is not None
    module = load(newest / "mp_rank_00_model_states.pt")["module"]
    assert module and all("lora_" in name for name in module)


def same(left: Shards, right: Shards, *, states: bool) -> None:
    names = left.shapes.keys() & right.shapes.keys()
    assert len(names) > 4
    for name in names:
        kinds = ("weight", *(left.kinds(name) if states else ()))
        assert left.shapes[name] == right.shapes[name]
        assert all(torch.equal(left.read(name, kind).float(), right.read(name, kind)) for kind in kinds), name
        if states:
            assert left.scalars(name) == right.scalars(name)
            assert len(kinds) == 3
    assert left.buffers.keys() == right.buffers.keys()
    assert all(torch.equal(left.buffers[name], right.buffers[name]) for name in left.buffers)
