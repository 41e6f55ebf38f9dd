"""The process of a job: `python -m dstune.finetuning.jobs.process FOLDER LOCK` validates its files, or trains and exports.

It has its own session and outlives the server. It reads `task.json` and communicates through files only. LOCK is the descriptor of
the folder's lock, which the server took before it started this process; a training that outlives this process keeps holding the
lock.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dstune.core.child_python import child_environment
from dstune.core.errors import EXIT_DONE, EXIT_FAILED, EXIT_PREEMPTED
from dstune.core.parsing import parse_json
from dstune.finetuning.jobs import configuration
from dstune.finetuning.jobs.folder import NOW, JobFolder, read, write
from dstune.launch import records
from dstune.protocols import LAUNCHERS
from dstune.protocols.launcher import Unreachable

POLL_SECONDS = 0.1
QUEUE_SECONDS = 5.0
"""Interval of queries to a cluster's queue."""
TWICE_SECONDS = 0.5
"""Pause between two signals, so that they count as two."""
EXIT_LOST = -1
"""Exit code for a cluster job that ended without a result: it starts again from its newest checkpoint."""
VALIDATE, TRAIN = "validate", "train"
QUEUED_STATES = ("running", "pending", "elsewhere")
ENDED = {"completed": EXIT_DONE, "stopped": EXIT_DONE, "preempted": EXIT_PREEMPTED, "failed": EXIT_FAILED}
LOOKS = 3
"""How often a missing job without a result is checked before it counts as lost."""


def main(argv: list[str]) -> int:
    folder, lock = JobFolder(Path(argv[0])), int(argv[1])
    task = read(folder.task) or {}
    if task.get("phase") == VALIDATE:
        threading.Thread(target=_end_on_stop, args=(folder,), daemon=True).start()
        write(folder.validated, validate(folder, task))
        return EXIT_DONE
    ended = Training(folder, lock, str(task["pool"]), task.get("devices")).run()
    write(folder.ended, {"attempt": task.get("attempt"), **ended})
    return EXIT_DONE


# -- files


def _end_on_stop(folder: JobFolder) -> None:
    """End this process once a stop is requested: nobody waits for the rows of a cancelled job, and the next validation needs its
    core."""
    while folder.stop_requested() != NOW:
        time.sleep(POLL_SECONDS)
    os._exit(EXIT_PREEMPTED)


def validate(folder: JobFolder, task: dict[str, Any]) -> dict[str, Any]:
    """Return the rows and tokens of the files, or the error of a failed job."""
    from dstune.finetuning import rows
    from dstune.finetuning.row_images import why_blind

    model = task.get("model") or {}
    blind = why_blind(model["path"], model["revision"], model["name"]) if model else ""
    method, most = str(task["method"]), int(task["most_rows"])
    report: dict[str, Any] = {"warnings": []}
    held_out: set[bytes] = set()
    for param, title, least in (("validation_file", "Validation", 1), ("training_file", "Training", rows.LEAST_ROWS)):
        if task.get(param) is None:
            continue
        source, target = folder.snapshot(param), folder.of_param(param)
        checked = rows.check_file(source, method, least=least, title=title, blind=blind)
        error = checked.error(str(task[param]), param)
        if error is None and checked.rows > most:
            message = f"{title} file has {checked.rows} example(s), this model takes {most} at most"
            error = {"code": "exceeded_quota", "message": message, "param": param}
        if error is not None:
            return {"error": error}
        rows.write_rows(source, target, method)
        report[param] = {"rows": checked.rows}
        if param == "validation_file":
            held_out = set(_digests(target))
        elif shared := sum(digest in held_out for digest in _digests(target)) if held_out else 0:
            text = (
                f"{shared} example(s) of the training file are in the validation file too, whose loss will be too low"
            )
            report["warnings"].append(text)
    return report


def _digests(file: Path) -> Iterator[bytes]:
    """Yield the digest of each line of the file."""
    with file.open("rb") as stream:
        for line in stream:
            yield hashlib.sha256(line).digest()[:16]


# -- training


class Training:
    """One attempt: `dstune train`, then the exports of the saved checkpoints."""

    def __init__(self, folder: JobFolder, lock: int, pool: str, devices: int | None = None):
        """devices: how many ranks a training on this machine has; None means as configured."""
        self._folder, self._lock, self._pool = folder, lock, pool
        self._overrides = [] if devices is None else [f"launch.processes={int(devices)}"]
        self._queued = LAUNCHERS[pool].queue is not None
        self._running = 0.0
        """Seconds that a cluster job has run."""
        self._signals = 0
        """Number of forwarded signals."""
        self._signalled_at = 0.0
        self._signalled = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def _note(self, number: int, frame: object) -> None:
        self._signalled = True

    def run(self) -> dict[str, Any]:
        code, report = self._train()
        result = records.read_result(self._folder.run) or {}
        if code in (EXIT_DONE, EXIT_PREEMPTED) and self._folder.stop_requested() != NOW:
            exported = self._export()
            if exported != EXIT_DONE and code == EXIT_DONE:
                code = exported
        problems = (report.get("error") or {}).get("problems") or []
        return {
            "code": code,
            "status": result.get("status"),
            "reason": str(result.get("reason") or (report.get("error") or {}).get("message") or ""),
            "problems": problems,
            "tokens": result.get("tokens"),
            "steps": result.get("steps"),
            "seconds": self._running if self._queued else None,
        }

    def _train(self) -> tuple[int, dict[str, Any]]:
        if self._in_queue():
            return self._wait_in_queue(), {}
        command = [
            sys.executable,
            "-m",
            "dstune",
            "train",
            *configuration.arguments(self._folder),
            *self._overrides,
            "--json",
        ]
        with self._folder.report.open("wb") as report, self._folder.log.open("ab") as log:
            process = subprocess.Popen(
                command,
                env=child_environment(),
                stdin=subprocess.DEVNULL,
                stdout=report,
                stderr=log,
                pass_fds=(self._lock,),
            )
            while process.poll() is None:
                self._forward_stop(process)
                time.sleep(POLL_SECONDS)
        code = process.returncode
        if code == EXIT_DONE and self._in_queue():  # it was submitted to a queue, which needs no process here
            code = self._wait_in_queue()
        return code, self._last_object()

    def _forward_stop(self, process: subprocess.Popen[bytes]) -> None:
        """Forward a stop request as signals to the launching process: the first lets it save, a second one does not."""
        how = self._folder.stop_requested()
        signals_due = 2 if how == NOW else 1 if how or self._signalled else 0
        if signals_due > self._signals and time.monotonic() - self._signalled_at > TWICE_SECONDS:
            with contextlib.suppress(OSError):
                process.send_signal((signal.SIGTERM, signal.SIGINT)[self._signals])
            self._signals, self._signalled_at = self._signals + 1, time.monotonic()

    def _last_object(self) -> dict[str, Any]:
        """Return the last JSON object in the output; {} if there is none."""
        for line in reversed(self._folder.report.read_bytes().splitlines()):
            with contextlib.suppress(ValueError):
                value = parse_json(line)
                if isinstance(value, dict):
                    return value
        return {}

    # -- in a cluster's queue, whose jobs need no process here

    def _in_queue(self) -> bool:
        """Return whether a job of this run is queued or running, including one whose submission was killed before it was recorded.
        Waits until the queue answers: submitting without knowing could create a second job."""
        queue, run = LAUNCHERS[self._pool].queue, self._folder.run
        if queue is None:
            return False
        launched = records.read_launch(run)
        if launched is not None and launched.jobs and records.read_result(run) is None:
            return True
        while True:
            try:
                lost = queue.named(self._folder.path.name)
                break
            except Unreachable as error:
                print(f"{queue.name} does not answer: {error}", file=sys.stderr, flush=True)
                time.sleep(QUEUE_SECONDS)
        if lost:
            run.mkdir(exist_ok=True)
            records.note(run, uuid.uuid4().hex, launched.processes if launched else 1, lost, self._pool)
        return bool(lost)

    def _wait_in_queue(self) -> int:
        from dstune.launch.manage import cancel, status_of

        run, obeyed, unsure, looked = self._folder.run, "", 0, time.monotonic()
        # On a shared file system, the result may appear later than the job's end.
        while (status := status_of(run)).state in QUEUED_STATES or unsure < LOOKS:
            if status.state in ENDED:
                break
            unsure = 0 if status.state in QUEUED_STATES else unsure + 1
            now = time.monotonic()
            self._running += now - looked if status.state == "running" else 0.0
            looked = now
            how = self._folder.stop_requested()
            if how and how != obeyed:
                cancel([str(run), "--json", *(["--now"] if how == NOW else [])])
                obeyed = how
            time.sleep(QUEUE_SECONDS)
        code = ENDED.get(status.state, EXIT_LOST)
        launched = records.read_launch(run)
        if code == EXIT_LOST and launched is not None:
            # The next attempt does not wait for this job, but submits the run again.
            records.note(run, launched.id, launched.processes)
        return code

    def _export(self) -> int:
        command = [sys.executable, "-m", "dstune.finetuning.jobs.export", str(self._folder.path)]
        with self._folder.log.open("ab") as log:
            process = subprocess.Popen(
                command, env=child_environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
            while process.poll() is None:
                if self._folder.stop_requested() == NOW:
                    process.kill()
                time.sleep(POLL_SECONDS)
        return process.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
