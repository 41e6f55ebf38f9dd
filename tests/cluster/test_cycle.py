"""The script that `dstune cycle CONFIG schedule --for slurm` writes, run by SLURM's own daemons."""

from __future__ import annotations

import json

import pytest
from support.command import wait_until
from support.served_runs import save_run
from support.tiny import save_encoder, write_labelled

pytestmark = pytest.mark.cluster


def test_slurm_runs_a_cycle_and_queues_the_next_one(on_slurm, slurm):
    folder = on_slurm.folder / "cycled"
    folder.mkdir()
    rows = write_labelled(folder / "rows.jsonl", 60)
    save_run(folder / "run", save_encoder(folder / "model"), rows, "task=classification", labels=("left", "right"))
    (folder / "feedback.jsonl").write_text('{"id": "1", "text": "w1"}\n')
    (folder / "cycle.yaml").write_text(json.dumps({"run": "run", "folder": "cycle", "data": "feedback.jsonl"}))
    written = on_slurm.run("cycle", "cycled/cycle.yaml", "schedule", "--for", "slurm")
    assert written.returncode == 0, written.stderr
    submitted = on_slurm.call("sbatch", written.stdout.strip())
    assert submitted.returncode == 0, submitted.stderr
    ledger = folder / "cycle" / "ledger.jsonl"
    wait_until(ledger.is_file, timeout=240)
    assert json.loads(ledger.read_text())["decision"] == "nothing"
    queue = slurm.call("squeue", "--noheader", "--name=dstune-cycle", "--states=PENDING", "--format=%j %r")
    slurm.call("scancel", "--name=dstune-cycle")
    assert queue.split() in (["dstune-cycle", "BeginTime"], ["dstune-cycle", "Dependency"])
