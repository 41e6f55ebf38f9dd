"""What training does to other rows and to held-out ones: guard, another domain, the gap, and the way back to the best."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.ranks import run_ranks
from support.tiny import save_decoder, write_dialogues
from support.workshop import Workshop

from dstune.evaluation import command as evaluate
from dstune.launch.summary import summary
from dstune.report.page import write

PROGRAM = Path(__file__).parents[1] / "parity" / "train_cases.py"
CASES = {
    "last": ["zero=stage3"],
    "best": ["zero=stage3", "run.export=best"],
    "light": ["zero=stage1", "run.export=best", "checkpoint.weights_only=true"],
    "gap": ["zero=stage2", "trainer.early_stopping.max_gap=0.5"],
}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    folder = tmp_path_factory.mktemp("watch")
    parts = {
        part: write_dialogues(folder / f"{part}.jsonl", rows, seed=seed)
        for seed, (part, rows) in enumerate({"train": 12, "validation": 8, "test": 9, "guard": 6, "ood": 7}.items())
    }
    base = [
        f"model.path={save_decoder(folder / 'model')}",
        *(f"data.{part}={file}" for part, file in parts.items()),
        *("data=files", "data.max_length=48", "data.packing=false", "method=full", "optimizer.lr=2e-2"),
        *("schedule=constant", "trainer.precision=fp32", "trainer.micro_batch_size=2", "trainer.global_batch_size=6"),
        *("trainer.max_steps=8", "evaluate.every=2", "evaluate.at_start=false", "launch.processes=2"),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DSTUNE_CACHE", str(folder / "cache"))
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        shop = Workshop(folder, base)
        cases = [shop.case(name, *overrides) for name, overrides in CASES.items()]
        _, *cut = shop.stopped_and_continued("again", *CASES["best"])
        run_ranks(PROGRAM, 2, [*cases, *cut])
        yield shop


def measured(capsys, workshop: Workshop, model: Path, part: str) -> dict[str, float]:
    """By the verb, on one rank, of a plain folder."""
    data = [f"data.{name}={workshop.folder / name}.jsonl" for name in ("train", part)]
    settings = ["task=chat", "data=files", "data.max_length=48", "data.packing=false", "trainer.precision=fp32"]
    arguments = [*settings, *data, "launch.processes=1", "data.clean.leaks=false", "task.template_date=2025-01-01"]
    assert evaluate.main([str(model), *arguments, "--split", part, "--json"]) == 0
    return json.loads(capsys.readouterr().out)["metrics"]


def test_watched_rows_are_measured_before_and_after(workshop, capsys):
    result = workshop.result("best")
    for part in ("guard", "ood"):
        found = result[part]
        assert abs(found["after"]["loss"] - found["before"]["loss"]) > 0.01
        steps = [row["step"] for row in workshop.rows("best") if f"{part}/loss" in row]
        assert steps == [0, 8]
    assert result["guard"]["before"] != result["ood"]["before"]
    for model, moment in (("model", "before"), ("best/export", "after")):
        found = measured(capsys, workshop, workshop.folder / model, "guard")
        assert found == pytest.approx(result["guard"][moment], rel=1e-4), moment


def test_what_is_measured_at_the_end_is_what_is_exported(workshop, capsys):
    """The best weights, not the last ones: at ZeRO-3, and from a checkpoint of weights alone at ZeRO-1."""
    best, light, last = (workshop.result(name) for name in ("best", "light", "last"))
    found = measured(capsys, workshop, workshop.folder / "light" / "export", "test")
    for result in (best, light):
        assert result["weights_step"] == result["best"]["step"] < 8 == last["weights_step"]
        assert result["test"] == pytest.approx(found, rel=1e-4)
        assert result["test"]["loss"] < last["test"]["loss"] - 0.01
        assert result["eval_final"]["loss"] > result["best"]["value"]


def test_the_gap_is_that_between_held_out_loss_and_the_training_loss_since_the_last_evaluation(workshop):
    rows = workshop.rows("last")
    steps = {row["step"]: row["loss"] for row in rows if "loss" in row}
    evaluated = [row for row in rows if "eval/loss" in row]
    assert [row["step"] for row in evaluated] == [2, 4, 6, 8]
    for row in evaluated:
        low, high = sorted(steps[row["step"] - back] for back in (0, 1))
        training = row["eval/loss"] - row["eval/gap"]  # the mean of two steps by their targets
        assert low - 1e-6 <= training <= high + 1e-6
    overfitting = workshop.result("last")["overfitting"]
    assert overfitting["gap"] == evaluated[-1]["eval/gap"] > evaluated[0]["eval/gap"]
    assert overfitting["held_out_loss"] - overfitting["training_loss"] == pytest.approx(overfitting["gap"])


def test_a_gap_too_wide_stops_the_run(workshop):
    result = workshop.result("gap")
    wide = [row["step"] for row in workshop.rows("last") if row.get("eval/gap", 0) >= 0.5]
    assert wide and result["status"] == "stopped" and result["steps"] == wide[0]
    assert result["reason"].startswith("overfitting") and "max_gap=0.5" in result["reason"]


def test_a_run_that_was_stopped_reports_the_same(workshop):
    whole, cut = workshop.result("best"), workshop.result("again-cut")
    for key in ("guard", "ood", "overfitting", "test", "weights_step"):
        assert whole[key] == cut[key], key
    assert workshop.rows("best") == workshop.rows("again-cut")


def test_console_and_report_show_it(workshop, tmp_path):
    page = summary(workshop.folder / "last")
    result = workshop.result("last")
    guard = result["guard"]
    assert f"guard loss     {guard['before']['loss']:.4f} -> {guard['after']['loss']:.4f}" in page
    assert f"risen since step {result['best']['step']}: run.export=best" in page
    assert "run.export=best" not in summary(workshop.folder / "best")
    write([workshop.folder / "last"], tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text()
    assert "What was not to be forgotten" in html and "Another domain" in html
