"""The command line as a user runs it, in a folder and with a cache of the test's own."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from support import warm_start

ROOT = Path(__file__).parents[2]
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def clean_environment(folder: Path) -> dict[str, str]:
    variables = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    return variables | {
        "DSTUNE_CACHE": str(folder / "cache"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(ROOT),
    }


class Commands:
    """Runs `dstune ...` in `folder`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.env = clean_environment(folder)

    def run(self, *arguments: str, program: tuple[str, ...] = (), timeout: float = 240) -> subprocess.CompletedProcess:
        command = [*(program or (sys.executable, "-m", "dstune")), *arguments]
        return warm_start.run(command, cwd=self.folder, env=self.env, capture_output=True, text=True, timeout=timeout)

    def start(self, *arguments: str) -> subprocess.Popen:
        log = (self.folder / "command.log").open("w")
        command = [sys.executable, "-m", "dstune", *arguments]
        return warm_start.Popen(command, cwd=self.folder, env=self.env, stdout=log, stderr=subprocess.STDOUT)

    @property
    def log(self) -> str:
        return (self.folder / "command.log").read_text()


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def at_step(run_dir: Path, step: int) -> bool:
    rows = metrics(run_dir)
    return bool(rows) and rows[-1]["step"] >= step


def overrides_of_run(name: str, steps: int, *further: str) -> list[str]:
    """Return a run of a tiny model on 300 conversations, both in the folder, that saves every 5 steps and evaluates every 10."""
    return [
        "model.path=model",
        "data.train=dialogues.jsonl",
        "data.max_length=64",
        "data.packing=false",
        "model.config_overrides={attention_dropout:0.1}",
        "optimizer.lr=1e-3",
        "zero=stage2",
        "trainer.micro_batch_size=2",
        "trainer.global_batch_size=8",
        f"trainer.max_steps={steps}",
        "checkpoint.every=5",
        "evaluate.every=10",
        "run.export=none",
        f"run.dir={name}",
        *further,
    ]


def result(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "result.json").read_text())


def exact(run_dir: Path) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl without times and memory: equal for equal trajectories."""
    volatile = {"tokens_per_second", "step_seconds", "peak_memory_gib", "eval/seconds"}
    volatile |= {"positions_per_second", "targets_per_second", "utilization"}
    volatile |= {f"{part}_seconds" for part in ("data", "forward", "backward", "update")}
    volatile |= {"slowest_rank", "slowest_to_median"}
    return [{key: value for key, value in row.items() if key not in volatile} for row in metrics(run_dir)]


def wait_until(condition: Callable[[], Any], timeout: float = 120) -> Any:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.02)
    raise AssertionError(f"nothing happened within {timeout} s")


def family_of(pid: int) -> list[psutil.Process]:
    """Return the living descendants of a command, but for the twin of a warm one (`warm_start`), which ends by itself when it
    ends."""
    processes = []
    for process in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):  # ended meanwhile
            processes += [process] if warm_start.__file__ not in process.cmdline() else []
    return processes


def ranks_of(run_dir: Path) -> list[psutil.Process]:
    """Return the living worker processes of a run, in no order."""
    processes = []
    for process in psutil.process_iter(["cmdline", "status"]):
        words = process.info["cmdline"] or []
        if "dstune.worker" in words and str(run_dir) in words and process.info["status"] != psutil.STATUS_ZOMBIE:
            processes.append(process)
    return processes
