"""A run on two ranks, killed once, stopped once and continued twice: each tracker has one run with every metric once."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.command import Commands, metrics, ranks_of, result, wait_until
from support.tiny import save_decoder, write_dialogues

pytest.importorskip("tensorboard", reason="pip install '.[tensorboard]' in a clone of dstune")
pytest.importorskip("mlflow", reason="pip install '.[mlflow]' in a clone of dstune")

STEPS = 40
SINK_IS_OFF = re.compile(r"warning: .*(is off for the rest of this run|tracked offline)")


def overrides(*further: str) -> list[str]:
    return [
        "model.path=model",
        "data.train=dialogues.jsonl",
        "data.max_length=64",
        "data.packing=false",
        "zero=stage2",
        "trainer.micro_batch_size=2",
        "trainer.global_batch_size=8",
        f"trainer.max_steps={STEPS}",
        "checkpoint.every=5",
        "evaluate.every=4",
        "evaluate.samples=1",
        "evaluate.max_new_tokens=4",
        "run.export=none",
        "launch.processes=2",
        "tracking.wandb.mode=offline",
        "tracking.tensorboard=true",
        "tracking.mlflow.uri=mlruns",
        "run.dir=run",
        *further,
    ]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    workplace = Commands(tmp_path_factory.mktemp("tracking"))
    save_decoder(workplace.folder / "model")
    write_dialogues(workplace.folder / "dialogues.jsonl", 300)
    run_dir = workplace.folder / "run"
    ids = []

    def at_step(step: int) -> bool:
        return any(row["step"] >= step for row in metrics(run_dir))

    killed = workplace.start("train", *overrides())
    wait_until(lambda: at_step(8))
    next(rank for rank in ranks_of(run_dir) if rank.environ()["RANK"] == "1").kill()
    assert killed.wait(timeout=60) == 1
    ids.append((run_dir / "mlflow-id").exists() and (run_dir / "mlflow-id").read_text())

    stopped = workplace.start("train", *overrides())
    wait_until(lambda: at_step(16))
    stopped.send_signal(signal.SIGTERM)
    assert stopped.wait(timeout=90) == 75, workplace.log
    ids.append((run_dir / "mlflow-id").read_text())

    done = workplace.run("train", "run")
    assert done.returncode == 0, done.stdout + done.stderr
    # Other warnings depend on the machine: a rank that another program slows, evaluations that take most of so short a run.
    assert not [line for line in (done.stdout + done.stderr).splitlines() if SINK_IS_OFF.search(line)]
    ids.append((run_dir / "mlflow-id").read_text())
    assert len({name for name in ids if name}) == 1
    assert result(run_dir)["status"] == "completed"
    return run_dir


def logged(run_dir: Path) -> dict[int, dict]:
    table: dict[int, dict] = {}
    for row in metrics(run_dir):
        known = table.setdefault(row["step"], {})
        assert not set(known) & set(row) - {"step"}, "metrics.jsonl has a metric twice"
        known.update(row)
    return table


def by_name(run_dir: Path) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for step, row in logged(run_dir).items():
        for name in row:
            if name != "step":
                found.setdefault(name, []).append(step)
    return found


def test_wandb(run_dir):
    (folder,) = (run_dir / "wandb").glob("offline-run-*")
    command = [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--json", str(folder)]
    environment = os.environ | {"WANDB_MODE": "offline", "HOME": str(run_dir)}
    listing = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True).stdout
    found = [json.loads(line) for line in listing.splitlines()]
    (run,) = (record["run"] for record in found if record["type"] == "run")
    assert run["run_id"] == (run_dir / "wandb-id").read_text()
    rows = [record["history"]["item"] for record in found if record["type"] == "history"]
    assert [row["step"] for row in rows] == list(range(STEPS + 1))
    sent = [{name: value for name, value in row.items() if not name.startswith(("_", "samples"))} for row in rows]
    assert {row["step"]: row for row in sent} == logged(run_dir)


def test_tensorboard(run_dir):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    found = {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert found == by_name(run_dir)


def test_mlflow(run_dir, monkeypatch):
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    client = MlflowClient(str(run_dir.parent / "mlruns"))
    (run,) = client.search_runs([client.get_experiment_by_name("dstune").experiment_id])
    assert run.info.status == "FINISHED"
    names = by_name(run_dir)
    assert set(run.data.metrics) == set(names)
    for name, steps in names.items():
        assert [metric.step for metric in client.get_metric_history(run.info.run_id, name)] == steps, name
