"""A launcher process with small scripted ranks, for tests of the supervision."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]

# What every scripted rank knows: its rank, the run directory, and how to say where it is.
RANK_PRELUDE = """
import json, os, pathlib, signal, subprocess, sys, time
rank, run_dir = int(os.environ["RANK"]), pathlib.Path(sys.argv[1])
from dstune.core.rank_env import die_with_parent
die_with_parent()
def note(name, text=""):
    part = run_dir / f"part-{name}-{rank}"
    part.write_text(str(text))
    part.rename(run_dir / f"note-{name}-{rank}")
def result(status):
    (run_dir / "result.json").write_text(json.dumps({"status": status, "reason": "", "steps": 3}))
"""

LAUNCHER = """
import json, sys
from pathlib import Path
from dstune.core.errors import DstuneError
from dstune.launch import records
from dstune.launch.console import Console
from dstune.launch.local import supervise
from dstune.launch.commands import Machine, local_plan
from dataclasses import replace
sys.path.insert(0, {root!r})
from tests.support.configs import run_config
from dstune.launch.local.config import LocalConfig
run_dir, grace, ranks = Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
config = run_config(launch=LocalConfig(processes=ranks, grace_seconds=grace))
console = Console()
plan = local_plan(config, run_dir, machine=Machine(gpus=0, cores=2), console=console.kind)
argv = (sys.executable, "-u", str(run_dir / "rank.py"), str(run_dir))
plan = replace(plan, argv=(argv,) * ranks)
try:
    lock = records.acquire_lock(run_dir)
    code = supervise.run(config, run_dir, config.launch, plan=plan, console=console, lock=lock)
except DstuneError as error:
    print(error, file=sys.stderr)
    code = error.exit_code
sys.exit(code)
"""


class Launch:
    """A launcher that supervises ranks which run `script` (after RANK_PRELUDE) in `run_dir`."""

    def __init__(self, run_dir: Path, script: str, *, ranks: int = 2, grace: float = 3.0, stdout: int | None = None):
        self.run_dir = run_dir
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "rank.py").write_text(RANK_PRELUDE + script)
        self.errors = run_dir / "launcher.err"
        with self.errors.open("wb") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-c", LAUNCHER.format(root=str(ROOT)), str(run_dir), str(grace), str(ranks)],
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if stdout is None else stdout,
                stderr=errors,
                start_new_session=True,
            )

    def note(self, name: str, rank: int) -> str:
        """Return what `rank` wrote under `name`, once it has."""
        path = self.run_dir / f"note-{name}-{rank}"
        wait_for(path.exists, f"rank {rank} to note {name}; the launcher says {self.stderr()!r}")
        return path.read_text()

    def finish(self, timeout: float = 20.0) -> int:
        self.stdout, _ = self.process.communicate(timeout=timeout)
        return self.process.returncode

    def stderr(self) -> str:
        return self.errors.read_text()

    def result(self) -> dict[str, object]:
        return json.loads((self.run_dir / "result.json").read_text())

    def survivors(self) -> list[psutil.Process]:
        """Return processes that still have the run directory on their command line or in their environment."""
        marks = str(self.run_dir)
        processes = []
        for process in psutil.process_iter():
            try:
                process_texts = [*process.cmdline(), *process.environ().values()]
            except psutil.Error:
                continue
            if process.pid != os.getpid() and any(marks in text for text in process_texts):
                processes.append(process)
        return processes


def wait_for(condition: Callable[[], object], event: str, timeout: float = 20.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout} s for {event}"
        time.sleep(0.02)
