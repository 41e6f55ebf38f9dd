"""Directories of runs as training leaves them, written without training."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dstune.config.run_file import Composed, write_run
from dstune.config.schema import RunSection
from dstune.optim.adamw import AdamWConfig
from tests.support.configs import run_config

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&\x1b[31m{{ 7*7 }}"

RESULT = {
    "status": "completed",
    "reason": "",
    "steps": 40,
    "world_size": 2,
    "tokens": 40000,
    "seconds": 95.0,
    "tokens_per_second": 512.5,
    "peak_memory_gib": 3.25,
    "best": {"metric": "loss", "value": 2.235, "step": 40},
}
DATA = {
    "train": {
        "rows_read": 1000,
        "bad_rows": 3,
        "rows": 900,
        "samples": 890,
        "truncated": 90,
        "dropped": 10,
        "tokens": 100_000,
        "targets": 25_000,
        "shortest": 12,
        "longest": 700,
        "lengths": {"64": 300, "128": 510, "1024": 90},
        "packing": 0.973,
        "clean": {"near duplicates": {"removed": 87, "changed": 0, "flagged": 0}},
        "examples": {"near duplicates": [{"place": "my.jsonl:17", "text": "hello again"}]},
        "sources": {"chat": {"rows": 600, "tokens": 70_000}, "code": {"rows": 300, "tokens": 30_000}},
    }
}


def metrics_rows(steps: int, *, every: int = 10) -> list[dict[str, Any]]:
    """Return a falling loss with an evaluation before the first and after every tenth step."""
    rows: list[dict[str, Any]] = []
    for step in range(steps + 1):
        if step:
            rows.append(
                {
                    "step": step,
                    "epoch": step / 100,
                    "loss": 2 + math.exp(-step / 20) + 0.1 * (-1) ** step,
                    "lr": 1e-4 * (1 - step / (steps + 1)),
                    "grad_norm": 1.5,
                    "tokens": 1000 * step,
                    "tokens_per_second": 500.0,
                    "step_seconds": 2.0,
                    "peak_memory_gib": 3.25,
                }
            )
        if step % every == 0:
            loss = 2.1 + math.exp(-step / 20)
            rows.append({"step": step, "eval/loss": loss, "eval/perplexity": math.exp(loss), "eval/seconds": 1.0})
    return rows


def write_run_directory(
    folder: Path,
    *,
    name: str = "run",
    lr: float = 1e-4,
    overrides: Sequence[str] = (),
    metrics: Sequence[Mapping[str, Any]] | None = None,
    samples: Sequence[Mapping[str, Any]] = (),
    **files: Mapping[str, Any],
) -> Path:
    """Write a run with `run.yaml`, `metrics.jsonl` (40 steps when not given), `samples.jsonl`, and `files` as NAME.json."""
    folder.mkdir(parents=True, exist_ok=True)
    config = run_config(optimizer=AdamWConfig(lr=lr), run=RunSection(name=name, dir=str(folder)))
    write_run(folder / "run.yaml", Composed(config, list(overrides)))
    for file, rows in (("metrics", metrics_rows(40) if metrics is None else metrics), ("samples", samples)):
        (folder / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for file, content in files.items():
        (folder / f"{file}.json").write_text(json.dumps(content))
    return folder


def full_run(folder: Path, **changes: Any) -> Path:
    """Return a completed run of 40 steps that was resumed once, with every file; `changes` as for `write_run_directory`."""
    settings: dict[str, Any] = {
        "result": RESULT,
        "data_report": DATA,
        "environment": {
            "devices": ["NVIDIA H100"] * 2,
            "hosts": ["node1"],
            "packages": {"torch": "2.13.0"},
            "model": {"path": "m", "parameters": 1000, "trained": 10},
            "launches": [{"step": 0, "time": "then"}, {"step": 20, "time": "later"}],
        },
        "samples": [
            {"step": 0, "prompt": "Hey", "reference": "hey whats up", "answer": "Hello! How can I help?"},
            {"step": 40, "prompt": "Hey", "reference": "hey whats up", "answer": "not much"},
        ],
    }
    return write_run_directory(folder, **(settings | changes))


def write_sweep_directory(
    folder: Path, trials: Sequence[Mapping[str, Any]], objective: Sequence[str] = ("loss",), **changes: Any
) -> Path:
    """Write a sweep with a run for each of `trials`, whose keys are those of `trials/NAME.json`; `run=False` for one that
    failed before it had a directory. changes: of every run, as for `write_run_directory`."""
    (folder / "trials").mkdir(parents=True)
    (folder / "sweep.yaml").write_text(json.dumps({"objective": list(objective), "overrides": [], "config": {}}))
    for number, trial in enumerate(trials):
        record = {"number": number, "status": "completed", "seconds": 60.0, "starts": 1, **trial}
        with_run = record.pop("run", True)
        (folder / "trials" / f"{record['name']}.json").write_text(json.dumps(record))
        if with_run:
            result = {**RESULT, "status": record["status"], "reason": record.get("reason", "")}
            options = {"result": result, **changes, **record.pop("files", {})}
            write_run_directory(folder / record["name"], name=record["name"], **options)
    return folder
