"""A run that a fault strikes: how it is started, struck, continued and compared (the faults are in `support.faults`)."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from dstune.checkpoint import store
from support.command import Commands, exact, metrics, overrides_of_run, ranks_of, wait_until
from support.tiny import save_decoder, write_dialogues

STEPS, EVERY, AT = 40, 5, 13
"""Steps of a run, between two saves, and after which a fault strikes."""
INJECT = Path(__file__).with_name("inject")
EXIT_SECONDS = 20.0
"""No fault may keep the command longer than this, but for the time that a watchdog was told to wait."""

Strike = Callable[[subprocess.Popen, Path], None]


@dataclass
class Fault:
    """One way to disturb a run."""

    name: str
    what: str
    strike: Strike | None = None
    """Acts on the running command at step AT; None where the fault comes from inside."""
    inject: dict[str, Any] = field(default_factory=dict)
    """For tests/support/inject/sitecustomize.py."""
    overrides: list[str] = field(default_factory=list)
    exit_code: int = 1
    says: str | tuple[str, ...] = ()
    """Patterns of what the command has to say: the rank and the cause."""
    again: list[str] = field(default_factory=list)
    """Overrides of the command that continues the run."""
    damage: Callable[[Path], None] | None = None
    """Acts on the newest checkpoint before the run is continued."""
    close: bool = False
    """The continued curve is compared within 1e-5: at another layout sums have another order."""
    disk: bool = False
    """In a run directory on a disk of 24 MB."""
    waits: float = 0.0
    """Seconds that the run is meant to wait before it ends."""
    repair: Callable[[Path], None] | None = None
    """Acts before the run is continued, on its directory."""


@dataclass
class Outcome:
    name: str
    what: str
    exit_code: int | None = None
    exit_seconds: float | None = None
    """From the fault to the command's end; None where the run went on."""
    left: int = 0
    """Processes that were still there afterwards."""
    message: str = ""
    lost: int | None = None
    """Steps that had to be trained again."""
    resume_seconds: float | None = None
    """From the command that continues the run to its first new step."""
    equal: bool | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Scene:
    """A folder with a model, data and the undisturbed run."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.commands, self.folder = Commands(folder), folder
        if not (folder / "undisturbed" / "export").exists():
            save_decoder(folder / "model")
            write_dialogues(folder / "dialogues.jsonl", 400)
            done = self.commands.run("train", *self.overrides("undisturbed"), timeout=600)
            assert done.returncode == 0, done.stdout + done.stderr
        self.reference = exact(folder / "undisturbed")

    def overrides(self, name: str | Path, *further: str) -> list[str]:
        changed = ["trainer.global_batch_size=32"]  # steps take long enough for a fault to strike between two of them
        changed += ["trainer.precision=fp32", f"checkpoint.every={EVERY}", "run.export=last", "launch.processes=2"]
        return overrides_of_run(str(name), STEPS, *changed, *further)

    def start(self, run_dir: Path, *further: str, inject: dict[str, Any] | None = None) -> subprocess.Popen:
        environment_before = dict(self.commands.env)
        if inject:
            path = os.pathsep.join([str(INJECT), environment_before["PYTHONPATH"]])
            self.commands.env |= {"DSTUNE_FAULT": json.dumps(inject), "PYTHONPATH": path}
        try:
            return self.commands.start("train", *self.overrides(run_dir, *further))
        finally:
            self.commands.env = environment_before

    def weights(self, name: str) -> bytes:
        return (self.folder / name / "export" / "model.safetensors").read_bytes()


def play(scene: Scene, fault: Fault) -> Outcome:
    """Let `fault` strike a run, continue the run, and compare."""
    with _place(scene, fault) as run_dir:
        shutil.rmtree(run_dir, ignore_errors=True)  # of a try that was cut off
        command = scene.start(run_dir, *fault.overrides, inject=fault.inject)
        outcome = Outcome(fault.name, fault.what)
        wait_until(lambda: last_step(run_dir) >= AT or command.poll() is not None, timeout=600)
        struck = time.monotonic()
        if fault.strike is not None:
            fault.strike(command, run_dir)
            struck = time.monotonic()
        try:
            outcome.exit_code = command.wait(timeout=600)
        except subprocess.TimeoutExpired:
            for process in [*ranks_of(run_dir), command]:
                process.kill()
            outcome.message = "it hung"
            return outcome
        if outcome.exit_code != 0:
            outcome.exit_seconds = time.monotonic() - _last_written(run_dir) if fault.strike is None else None
            outcome.exit_seconds = outcome.exit_seconds or time.monotonic() - struck
        time.sleep(0.3 if outcome.exit_code != -signal.SIGKILL else 2.0)  # the guard of a killed command needs a moment
        outcome.left = len(left_of(run_dir))
        outcome.message = message(scene.commands.log, fault.says)
        if fault.repair is not None:
            fault.repair(run_dir)
        if outcome.exit_code == 0:
            outcome.lost, outcome.equal = 0, exact(run_dir) == scene.reference
            return outcome
        if fault.damage is not None:
            newest = store.newest(run_dir)
            assert newest is not None
            fault.damage(newest)
        return resumed(scene, run_dir, outcome, fault)


def resumed(scene: Scene, run_dir: Path, outcome: Outcome, fault: Fault) -> Outcome:
    step_before, launched = last_step(run_dir), len(_launches(run_dir))
    began = time.monotonic()
    command = scene.commands.start("train", str(run_dir), *fault.again)
    wait_until(lambda: len(_launches(run_dir)) > launched or command.poll() is not None, timeout=600)
    start = _launches(run_dir)[-1]["step"]
    wait_until(lambda: last_step(run_dir) > start or command.poll() is not None, timeout=600)
    outcome.resume_seconds = time.monotonic() - began
    outcome.lost = step_before - start
    code = command.wait(timeout=600)
    assert code == 0, scene.commands.log
    rows = exact(run_dir)
    outcome.equal = near(rows, scene.reference) if fault.close else rows == scene.reference
    if fault.damage is not None:
        outcome.message = message(scene.commands.log, fault.says)
    return outcome


def check(fault: Fault, outcome: Outcome) -> list[str]:
    """Return what is not as it should be."""
    wrong = []
    if outcome.exit_code != fault.exit_code:
        wrong.append(f"exit code {outcome.exit_code}, not {fault.exit_code}")
    if outcome.left:
        wrong.append(f"{outcome.left} processes left")
    unsaid = [pattern for pattern in as_patterns(fault.says) if not re.search(pattern, outcome.message)]
    wrong += [f"it said {outcome.message!r}, not {pattern!r}" for pattern in unsaid]
    if outcome.exit_seconds is not None and outcome.exit_seconds > EXIT_SECONDS + fault.waits:
        wrong.append(f"{outcome.exit_seconds:.1f} s to exit")
    if not outcome.equal:
        wrong.append("the curve is another one")
    return wrong


@contextlib.contextmanager
def _place(scene: Scene, fault: Fault) -> Iterator[Path]:
    name = re.sub(r"\W+", "-", fault.name)
    if not fault.disk:
        yield scene.folder / name
        return
    disk = scene.folder / f"disk-{name}"
    disk.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)], check=True)
    try:
        yield disk / name
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def last_step(run_dir: Path) -> int:
    rows = metrics(run_dir)
    return int(rows[-1]["step"]) if rows else 0


def _launches(run_dir: Path) -> list[dict[str, Any]]:
    """Return the launches of a run that came to training, each with the step that it began from."""
    try:
        return json.loads((run_dir / "environment.json").read_text())["launches"]
    except (OSError, ValueError):  # not there yet, or being written
        return []


def _last_written(run_dir: Path) -> float:
    """Return when the last row was written, on the clock of `time.monotonic`."""
    written = run_dir / "metrics.jsonl"
    if not written.exists():  # it failed before the first step, and what it wrote last are the rank's last words
        written = max((run_dir / "logs").glob("rank-*.log"), key=lambda log: log.stat().st_mtime)
    return time.monotonic() - (time.time() - written.stat().st_mtime)


def message(log: str, patterns: str | tuple[str, ...]) -> str:
    """Return the last lines of the command in which the patterns are found."""
    lines = [line.strip().removeprefix("| ").removeprefix("dstune: ") for line in log.splitlines() if line.strip()]
    lines_found = []
    for pattern in as_patterns(patterns):
        lines_found += [line for line in lines if re.search(pattern, line)][-1:]
    return "; ".join(dict.fromkeys(lines_found))


def as_patterns(says: str | tuple[str, ...]) -> tuple[str, ...]:
    return (says,) if isinstance(says, str) else says


def near(rows: list[dict[str, Any]], reference: list[dict[str, Any]], bound: float = 1e-5) -> bool:
    """Return whether every metric of every row is within a relative `bound` of the reference: the norm of the gradient, which sums
    up differences, within ten times as much, and the gap, a difference of two losses, within `bound` of 1."""

    def agrees(key: str, first: Any, second: Any) -> bool:
        limit = 10 * bound if key == "grad_norm" else bound
        size = 1.0 if key == "eval/gap" else abs(second)
        return first == second or (isinstance(first, float) and abs(first - second) <= limit * size)

    return len(rows) == len(reference) and all(
        row.keys() == other.keys() and all(agrees(key, row[key], other[key]) for key in row)
        for row, other in zip(rows, reference, strict=True)
    )


def left_of(run_dir: Path) -> list[psutil.Process]:
    """Return living processes that have the run directory on their command line."""
    processes = []
    for process in psutil.process_iter(["cmdline", "status"]):
        words = process.info["cmdline"] or []
        if str(run_dir) in words and process.info["status"] != psutil.STATUS_ZOMBIE and process.pid != os.getpid():
            processes.append(process)
    return processes
