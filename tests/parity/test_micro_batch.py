"""Measuring the size of a micro-batch leaves no trace: the run is that with the number given, to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from parity.test_ladder import PROGRAM, STAGES, exact, monkeypatch_module, workshop  # noqa: F401 (fixtures)
from parity.test_ladder import Workshop as Ladder
from support.ranks import run_ranks
from support.tiny import save_decoder, save_encoder, write_contrastive, write_dialogues, write_preferences
from support.workshop import Workshop

AUTO = "trainer.micro_batch_size=auto"
COMMON = ["optimizer=adamw", "optimizer.lr=1e-3", "trainer.max_steps=3", "data.packing=false"]


def test_a_measured_size_gives_the_run_of_that_size(workshop: Ladder):  # noqa: F811
    """With dropout, at every stage, and in bf16 where sums of gradients are kept apart."""
    kinds = [(f"s{stage}", [f"zero=stage{stage}"]) for stage in STAGES]
    kinds += [("s2-bf16", ["zero=stage2", "trainer.precision=bf16"]), ("packed", ["zero=stage3", "data.packing=true"])]
    cases: list[dict[str, Any]] = []
    for name, overrides in kinds:
        # Whatever the times are, the largest size is taken: five rows, half of the global batch.
        cases.append({**workshop.case(f"{name}-auto", *COMMON, *overrides, AUTO), "gain": 0.0})
        cases.append(workshop.case(f"{name}-given", *COMMON, *overrides, "trainer.micro_batch_size=5"))
    run_ranks(PROGRAM, 2, cases)
    for name, _ in kinds:
        found = workshop.result(f"{name}-auto")["micro_batch"]
        assert (found["rows"], found["world_size"]) == (5, 2), name
        assert [trial["rows"] for trial in found["trials"]] == [1, 2, 4, 5]
        assert all(trial["rows_per_second"] > 0 for trial in found["trials"])
        assert exact(workshop.folder / f"{name}-auto") == exact(workshop.folder / f"{name}-given"), name
        measured, given = workshop.weights(f"{name}-auto"), workshop.weights(f"{name}-given")
        assert all(torch.equal(measured[key], given[key]) for key in given), name


@pytest.mark.ci
def test_other_tasks_and_unfrozen_layers_are_measured_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Losses over pairs, over a global batch, with a reference computed after the size is found, and of layers that come later;
    the peak of the run is that of its size."""
    monkeypatch.setenv("DSTUNE_CACHE", str(tmp_path / "cache"))
    decoder, encoder = (f"model.path={save(tmp_path / save.__name__)}" for save in (save_decoder, save_encoder))
    pairs, texts = write_preferences(tmp_path / "pairs.jsonl", 40), write_contrastive(tmp_path / "texts.jsonl", 40)
    dialogues = f"data.train={write_dialogues(tmp_path / 'dialogues.jsonl', 40)}"
    kinds = {
        "dpo": ["task=preference", decoder, f"data.train={pairs}", "zero=stage2"],
        "kto": ["task=preference", "task.loss=kto", decoder, f"data.train={pairs}", "zero=stage3"],
        "embedding": ["task=embedding", encoder, f"data.train={texts}", "zero=stage3"],
        "ulmfit": ["task=chat", "method=ulmfit", "method.unfreeze_steps=1", decoder, dialogues, "zero=stage2"],
        "lora": ["task=chat", "method=lora", "method.dropout=0.1", decoder, dialogues, "zero=stage3"],
    }
    base = [
        "data=files",
        "data.max_length=64",
        "data.packing=false",
        "trainer.global_batch_size=10",
        "trainer.max_steps=2",
    ]
    shop = Workshop(tmp_path, [*base, "trainer.precision=fp32", "run.export=none", "evaluate.at_start=false"])
    cases: list[dict[str, Any]] = []
    for name, overrides in kinds.items():
        cases.append({**shop.case(f"{name}-auto", *overrides, AUTO), "gain": 0.0})
        cases.append(shop.case(f"{name}-given", *overrides, "trainer.micro_batch_size=5"))
    run_ranks(PROGRAM, 2, cases)
    for name in kinds:
        assert shop.result(f"{name}-auto")["micro_batch"]["rows"] == 5
        assert shop.rows(f"{name}-auto") == shop.rows(f"{name}-given"), name


@pytest.mark.ci
def test_a_continued_run_keeps_its_size(workshop: Ladder):  # noqa: F811
    common = [*COMMON, "zero=stage2", AUTO]
    cut = {**workshop.case("kept", *common, "run.time_limit=0.000001"), "gain": 0.0}
    # With times that ask for single rows: what was found before stays, on another number of ranks too.
    run_ranks(PROGRAM, 2, [cut, {**workshop.case("kept-end", *common, directory="kept"), "gain": 1e9}])
    longer = [*common, "trainer.max_steps=4"]
    run_ranks(PROGRAM, 1, [{**workshop.case("kept-alone", *longer, directory="kept"), "gain": 1e9}])
    found = workshop.result("kept")["micro_batch"]
    assert (found["rows"], found["world_size"]) == (5, 2)
    assert workshop.rows("kept")[-1]["step"] == 4
