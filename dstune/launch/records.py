"""What a launch leaves in the run directory for other processes: `launch.json`, `result.json`, the lock."""

from __future__ import annotations

import fcntl
import hashlib
import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dstune.checkpoint import store
from dstune.core import files
from dstune.core.errors import Problem, UserError
from dstune.core.parsing import MAX_BYTES, METRICS_BYTES, lines_within, open_file, parse_json, read_object
from dstune.core.paths import cache_root
from dstune.core.secrets import redacted
from dstune.launch.queues import queue_named
from dstune.protocols.launcher import Queue
from dstune.report.run_files import is_row, shaped_result
from dstune.tracking.jsonl import json_text

if TYPE_CHECKING:
    import psutil

LOCK = ".lock"
LEASE = "lease.json"
"""Who works on a run in a place without locks (`dstune.launch.mirror`)."""
DRIVER = Path("launch") / "driver"
"""File that a launcher of ranks on other machines touches while it lives; it holds the seconds that its ranks outlive it."""
LONGEST_SECONDS = 60.0
TAKEOVER_SECONDS = 15.0
"""How long to wait for the ranks of a launcher that was killed; its guard is ending them."""


@dataclass(frozen=True)
class LaunchRecord:
    """The process that started the ranks last."""

    id: str
    pid: int
    started: float
    """When that process started, in seconds since the epoch; a later process with the same pid started at another time."""
    host: str
    processes: int
    jobs: list[str] = field(default_factory=list)
    """Jobs that the ranks run in, one after the other."""
    launcher: str = "slurm"
    """The launcher that submitted `jobs`. Earlier versions, which did not write it, had only jobs of SLURM."""

    @property
    def is_here(self) -> bool:
        return self.host == socket.gethostname()

    def process(self, run_dir: Path) -> psutil.Process | None:
        """Return the process that launched the run in `run_dir` and holds its lock, if it is alive on this machine.

        A record may come from a stranger and name any process of this user: one that does not hold the lock is not it.
        """
        if not self.is_here:
            return None
        import psutil  # not at the top: 10 ms of every command

        try:
            process = psutil.Process(self.pid)
            is_same = abs(process.create_time() - self.started) < 1.0
            alive = is_same and process.status() != psutil.STATUS_ZOMBIE
            locks = (run_dir / LOCK, working_folder(run_dir) / LOCK)
            return process if alive and any(_holds(process, lock) for lock in locks if lock.exists()) else None
        except psutil.Error:
            return None


def working_folder(place: Path) -> Path:
    """Return where a run whose directory `place` cannot be worked in works on this machine (`dstune.launch.mirror`)."""
    return cache_root() / "runs" / hashlib.sha256(str(place.absolute()).encode()).hexdigest()[:16]


def begin(run_dir: Path, launch_id: str, processes: int, jobs: Sequence[str] = (), launcher: str = "") -> None:
    """Record that this process launches the run now, and remove the errors and the result of an earlier launch.

    jobs, launcher: as for `note`.
    """
    forget_ends(run_dir)
    note(run_dir, launch_id, processes, jobs, launcher)


def forget_ends(run_dir: Path) -> None:
    """Remove the result of an earlier attempt and the errors of its ranks."""
    (run_dir / "logs").mkdir(parents=True, exist_ok=True)
    for stale in (*(run_dir / "logs").glob("rank-*.error"), result_path(run_dir)):
        stale.unlink(missing_ok=True)


def note(run_dir: Path, launch_id: str, processes: int, jobs: Sequence[str] = (), launcher: str = "") -> None:
    """Write `launch.json` for this process. jobs: ids of jobs in a queue. launcher: name of the launcher that has the queue."""
    import psutil

    assert launcher or not jobs, "another launcher's queue would be asked about the jobs"
    me = psutil.Process()
    record = LaunchRecord(launch_id, me.pid, me.create_time(), socket.gethostname(), processes, list(jobs), launcher)
    write_json(run_dir / "launch.json", asdict(record))


def read_launch(run_dir: Path) -> LaunchRecord | None:
    try:
        record = LaunchRecord(**(read_json(run_dir / "launch.json") or {}))
    except TypeError:  # absent, or of another version
        return None
    numbers = all(
        isinstance(value, int | float) and value > 0 for value in (record.pid, record.started, record.processes)
    )
    texts = isinstance(record.host, str) and isinstance(record.launcher, str)
    if not (numbers and texts and isinstance(record.pid, int) and isinstance(record.jobs, list)):
        return None
    if record.jobs:
        job_id = (queue_named(record.launcher) or Queue).job
        if not all(isinstance(job, str) and job_id.fullmatch(job) for job in record.jobs):
            return None
    return record


def _holds(process: psutil.Process, lock: Path) -> bool:
    """Return whether the process has this file open. Raises psutil.Error where it is another user's."""
    import psutil

    try:
        lock_file = lock.stat()
        open_files = [os.stat(f"/proc/{process.pid}/fd/{name}") for name in os.listdir(f"/proc/{process.pid}/fd")]
    except FileNotFoundError:
        return any(Path(file.path) == lock.absolute() for file in process.open_files())
    except OSError as error:
        raise psutil.AccessDenied(process.pid) from error
    return any((status.st_dev, status.st_ino) == (lock_file.st_dev, lock_file.st_ino) for status in open_files)


def result_path(run_dir: Path) -> Path:
    return run_dir / "result.json"


def read_result(run_dir: Path) -> dict[str, Any] | None:
    result = read_json(result_path(run_dir))
    return None if result is None else shaped_result(result)


def write_result(
    run_dir: Path, status: str, reason: str, world_size: int, failure: dict[str, Any] | None = None
) -> None:
    """Write the result of a run whose ranks could not write it, from the rows that they logged and the newest checkpoint.

    failure: `rank`, `node` and `cause` of the failure of a run on several nodes.
    """
    logged = read_metrics(run_dir)
    checkpoint = store.newest(run_dir)
    state = _train_state(checkpoint)
    result = {
        "status": status,
        "reason": reason,
        "steps": logged.last.get("step", 0),
        "world_size": world_size,
        "tokens": logged.last.get("tokens"),
        "seconds": state.get("seconds"),
        "tokens_per_second": logged.last.get("tokens_per_second"),
        "peak_memory_gib": logged.last.get("peak_memory_gib"),
        "eval_initial": state.get("eval_initial") or logged.eval_initial,
        "eval_final": logged.eval_last or state.get("eval_last"),
        "best": state.get("best"),
        "test": None,
        "checkpoint": checkpoint and str(checkpoint),
        "export": None,
        "nonfinite_steps": logged.skipped["nonfinite"],
        "overflow_steps": logged.skipped["overflow"],
        **({"failure": failure} if failure else {}),
    }
    write_json(result_path(run_dir), result)


def _train_state(checkpoint: Path | None) -> dict[str, Any]:
    state = store.read_state(checkpoint).get("train") if checkpoint else None
    return state if isinstance(state, dict) else {}


@dataclass
class Logged:
    """The progress of a run according to its `metrics.jsonl`."""

    last: dict[str, Any] = field(default_factory=dict)
    """The newest training row; {} when there is none."""
    eval_initial: dict[str, Any] | None = None
    """Metrics of the evaluation before the first step, by their names in `result.json`."""
    eval_last: dict[str, Any] | None = None
    eval_step: int | None = None
    """The step after which `eval_last` was measured."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Number of steps without an update, by reason."""


def read_metrics(run_dir: Path) -> Logged:
    """Return the progress that `metrics.jsonl` shows; an incomplete last line is ignored."""
    logged = Logged()
    try:
        with open_file(run_dir / "metrics.jsonl") as stream:
            for line, _ in lines_within(stream, MAX_BYTES):
                if stream.tell() > METRICS_BYTES:
                    break
                try:
                    row = parse_json(line or b"")
                except ValueError:
                    continue
                if is_row(row):
                    _note(logged, row)
    except OSError:
        pass
    return logged


def _note(logged: Logged, row: dict[str, Any]) -> None:
    if "loss" in row:
        logged.last = row
        if "skipped" in row:
            logged.skipped[row["skipped"]] += 1
    evaluation = {name.removeprefix("eval/"): value for name, value in row.items() if name.startswith("eval/")}
    evaluation.pop("seconds", None)
    if evaluation:
        logged.eval_last, logged.eval_step = evaluation, row.get("step")
        if row.get("step") == 0:
            logged.eval_initial = evaluation


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write `value`, with secrets redacted, atomically."""
    files.write(path, json_text(redacted(value), indent=1) + "\n")


def read_json(path: Path) -> dict[str, Any] | None:
    return read_object(path)


def acquire_lock(run_dir: Path, *, shared: bool = False) -> int:
    """Lock the run directory for this process; return the descriptor of the lock, to keep open and to hand to the guard.

    shared: take a lock that other processes can share.

    Raises:
        UserError: another launch uses the directory.
    """
    descriptor = files.open_plain(run_dir / LOCK, os.O_RDWR | os.O_CREAT)
    deadline = time.monotonic() + TAKEOVER_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            return descriptor
        except BlockingIOError:
            record = read_launch(run_dir)
            # The guard of a killed launcher holds the lock until the ranks have ended.
            orphaned = record is not None and record.is_here and record.process(run_dir) is None
            if not orphaned or time.monotonic() > deadline:
                os.close(descriptor)
                raise UserError(in_use(run_dir, record)) from None
        time.sleep(0.1)


def wait_for_former_ranks(run_dir: Path, message: Callable[[str], None]) -> None:
    """Wait until no rank of an earlier launcher can be running.

    If that launcher was killed, its ranks on other machines end by themselves after the seconds that its file `DRIVER` holds.
    Raises UserError if the file is a link or not a plain file.
    """
    try:
        patience = min(LONGEST_SECONDS, float(files.read_plain(run_dir / DRIVER)))
        seconds_left = min(patience, (run_dir / DRIVER).stat().st_mtime + patience - time.time())
    except (OSError, ValueError):
        return
    if seconds_left > 0:
        message(f"dstune: the launch before this one died: {seconds_left:.0f} s until its ranks have ended")
        time.sleep(seconds_left)


def in_use(run_dir: Path, record: LaunchRecord | None) -> Problem:
    """Return the problem that another launch is using the run directory."""
    who = f"process {record.pid} on {record.host}" if record else "another process"
    fix = f"wait for it, stop it with `dstune cancel {run_dir}`, or give another run.dir"
    return Problem("run.dir", f"{who} is running here", fix, str(run_dir))
