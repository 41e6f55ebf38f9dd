"""The result of a run whose ranks were killed before they could write it."""

import json
import math

import numpy as np

from dstune.checkpoint import store
from dstune.evaluation import command
from dstune.launch import records
from dstune.rank import finalize

ROWS = [
    {"step": 0, "eval/loss": 4.0, "eval/accuracy": 0.5, "eval/seconds": 1.0},
    {"step": 1, "loss": 3.0, "tokens": 10, "tokens_per_second": 5.0, "peak_memory_gib": 0.5},
    {"step": 2, "loss": None, "tokens": 20, "tokens_per_second": 5.0, "peak_memory_gib": 0.5, "skipped": "nonfinite"},
    {"step": 2, "eval/loss": 2.0, "eval/accuracy": 0.75, "eval/seconds": 1.0},
    {"step": 3, "loss": 2.0, "tokens": 30, "tokens_per_second": 6.0, "peak_memory_gib": 0.6, "skipped": "overflow"},
    {"step": 4, "loss": 1.5, "tokens": 40, "tokens_per_second": 7.0, "peak_memory_gib": 0.7},
]


def write_rows(run_dir, rows):
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 5, "lo')


def test_what_the_ranks_logged_is_the_result(tmp_path):
    write_rows(tmp_path, ROWS)
    records.write_result(tmp_path, "failed", "rank 1 was killed", 2)
    result = records.read_result(tmp_path)
    assert (result["steps"], result["tokens"], result["tokens_per_second"]) == (4, 40, 7.0)
    assert result["eval_initial"] == {"loss": 4.0, "accuracy": 0.5}
    assert result["eval_final"] == {"loss": 2.0, "accuracy": 0.75}
    assert (result["nonfinite_steps"], result["overflow_steps"]) == (1, 1)
    assert (result["best"], result["checkpoint"], result["seconds"]) == (None, None, None)


def test_the_checkpoint_records_what_rows_do_not(tmp_path):
    write_rows(tmp_path, ROWS)
    written = store.folder(tmp_path) / f"{store.tag(2)}{store.INCOMPLETE}"
    written.mkdir(parents=True)
    best = {"metric": "loss", "value": 2.0, "step": 2}
    train = {"step": 2, "seconds": 12.5, "best": best, "eval_initial": {"loss": 4.0}, "eval_last": {"loss": 2.0}}
    checkpoint = store.commit(written, {"step": 2, "train": train})
    records.write_result(tmp_path, "failed", "rank 1 was killed", 2)
    result = records.read_result(tmp_path)
    assert (result["best"], result["seconds"], result["checkpoint"]) == (best, 12.5, str(checkpoint))
    assert result["eval_final"] == {"loss": 2.0, "accuracy": 0.75}, "the newest evaluation, even after the checkpoint"


def test_a_run_that_logged_nothing_has_a_result_too(tmp_path):
    records.write_result(tmp_path, "preempted", "before training began", 2)
    result = records.read_result(tmp_path)
    assert (result["status"], result["steps"], result["eval_final"], result["nonfinite_steps"]) == (
        "preempted",
        0,
        None,
        0,
    )


def test_values_of_the_environment_are_not_in_the_reason(tmp_path, monkeypatch):
    monkeypatch.setenv("A_TOKEN", "planted-token-value")
    records.write_result(tmp_path, "failed", "no access with planted-token-value", 1)
    assert records.read_result(tmp_path)["reason"] == "no access with ${oc.env:A_TOKEN}"


def test_a_number_that_is_not_finite_is_null(tmp_path, capsys):
    """JSON has no NaN, and other programs refuse a file that has one."""
    result = {"status": "completed", "eval_final": {"mine": math.nan, "loss": np.float32(0.5)}}
    folders = [tmp_path / "of_ranks", tmp_path / "of_launcher"]
    for folder in folders:
        folder.mkdir()
    finalize.write_result(folders[0], result)
    records.write_json(folders[1] / "result.json", result)
    command._print("runs/a", result, as_json=True)
    texts = [*((folder / "result.json").read_text() for folder in folders), capsys.readouterr().out]
    assert [json.loads(text)["eval_final"] for text in texts] == [{"mine": None, "loss": 0.5}] * 3
