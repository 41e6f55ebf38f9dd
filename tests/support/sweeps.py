"""Sweeps whose trials are scripts instead of training, for tests of the schedule."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from dstune.config.sweep_space import split
from dstune.launch.console import Console
from dstune.sweep import schedule
from dstune.sweep.devices import Slot
from dstune.sweep.grid import Grid
from tests.support.configs import run_config

ROOT = Path(__file__).parents[2]

TRIAL = """
import json, os, pathlib, signal, sys, time
words = dict(word.split("=", 1) for word in sys.argv[3:] if "=" in word)
run_dir, value = pathlib.Path(words["run.dir"].strip("'")), words.get("optimizer.lr")
cores = sys.argv[2]
run_dir.mkdir(exist_ok=True)
(run_dir / "run.yaml").write_text("config: {}")
starts = run_dir / "starts"
starts.write_text(f"{starts.read_text() if starts.exists() else ''}{time.time()} {cores} {os.environ.get('SLOT', '')}\\n")
asked = []
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, frame: asked.append(number))
def log(step, **values):
    with (run_dir / "metrics.jsonl").open("a") as stream:
        stream.write(json.dumps({"step": step, **values}) + "\\n")
def result(status, reason="", **more):
    aside = run_dir / "result.json.incomplete"
    aside.write_text(json.dumps({"status": status, "reason": reason, **more}))
    aside.replace(run_dir / "result.json")
def done(loss):
    result("completed", eval_final={"loss": loss}, seconds=1.0)
"""


class Scripted:
    """A sweep in `folder` over `overrides` whose trials run `script` (after TRIAL)."""

    def __init__(self, folder: Path, script: str, monkeypatch: pytest.MonkeyPatch):
        self.path = folder / "sweep"
        self.path.mkdir(exist_ok=True)
        program = folder / "trial.py"
        program.write_text(TRIAL + script)
        monkeypatch.setattr(schedule, "ENTRY", (sys.executable, str(program)))
        monkeypatch.setattr(schedule, "POLL_SECONDS", 0.02)
        monkeypatch.setenv("PYTHONPATH", str(ROOT))
        self.received: list[str] = []

    def run(self, *overrides: str, slots: Sequence[Slot] = (Slot("here"),), again: bool = False) -> Grid:
        grid = Grid(self.path, run_config(), split(overrides, {}).axes, ["loss"], repeat_finished=again)
        schedule.Schedule(self.path, grid, slots, ["trainer.seed=7"], Console(), self.received).run()
        return grid

    def starts(self, name: str) -> list[str]:
        """Return a line for each start of the trial: time, cores, slot."""
        file = self.path / name / "starts"
        return file.read_text().splitlines() if file.exists() else []
