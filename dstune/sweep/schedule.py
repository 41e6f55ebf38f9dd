"""Runs the trials of a sweep, as many at a time as there are slots. A failed trial does not stop the sweep.

Every trial is a process (`dstune train` with other values) in its own session: Ctrl-C in the terminal reaches only the sweep,
which then asks its trials to save.
"""

from __future__ import annotations

import contextlib
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from dstune.config.overrides import quoted
from dstune.core import files
from dstune.core.child_python import child_environment
from dstune.core.errors import EXIT_DONE, EXIT_FAILED, EXIT_PREEMPTED
from dstune.core.paths import PRUNE_FILE
from dstune.launch import attempt, records
from dstune.launch.console import Console
from dstune.sweep.devices import Slot
from dstune.sweep.directory import status_in, write_record
from dstune.sweep.outcome import Metrics
from dstune.tracking.trials import Record, read_record, record_path

ENTRY = (sys.executable, "-m", "dstune.sweep.trial")
"""Command that becomes `dstune train` for a trial."""
POLL_SECONDS = 0.2
PRUNE_PATIENCE = 60.0
"""Seconds that a pruned trial may take to end by itself, before it gets a signal; it looks for the request after every step."""


@dataclass(frozen=True)
class Trial:
    """One set of values."""

    name: str
    number: int
    overrides: list[str]
    """The values, as on the command line."""
    values: Mapping[str, Any]


@dataclass
class Running:
    """A trial whose process has been started."""

    trial: Trial
    slot: Slot
    process: subprocess.Popen[bytes]
    metrics: Metrics
    log_start: int
    """Offset in the trial's log, in bytes, at which this start of it begins."""
    record: Record
    started: float = field(default_factory=time.monotonic)
    pruned: str = ""
    """Why the trial is to be pruned; empty as long as it is not."""
    pruned_at: float = 0.0
    signals_sent: int = 0


class Source(Protocol):
    """Where trials come from: every combination, or Optuna."""

    def next(self) -> Trial | None:
        """Return the next trial to start, or None if there is none now. If `exhausted`, no further one will come."""
        ...

    @property
    def exhausted(self) -> bool: ...

    def watch(self, trial: Trial, rows: Sequence[Mapping[str, Any]]) -> str:
        """Note new rows of a trial's metrics.jsonl. Return why the trial is to be pruned, or an empty string."""
        ...

    def ended(self, trial: Trial, status: str, run_dir: Path) -> dict[str, float]:
        """Note that `trial` has ended. Return the values of its objectives."""
        ...


class Schedule:
    """Runs trials until the source has none left.

    common: arguments of `dstune train` for every trial. received: names of the signals that a handler has received so far.
    """

    def __init__(
        self,
        sweep: Path,
        source: Source,
        slots: Sequence[Slot],
        common: Sequence[str],
        console: Console,
        received: list[str],
        variables: Mapping[str, str] = MappingProxyType({}),
    ):
        """variables: environment variables of all trials, in addition to those of this process."""
        self._variables = variables
        self._sweep, self._source, self._common = sweep, source, list(common)
        self._free = list(slots)
        self._console, self._received = console, received
        self._running: list[Running] = []
        self._announced_signals = 0
        (sweep / "logs").mkdir(exist_ok=True)

    def run(self) -> None:
        """Start and watch trials until none is left or the sweep is asked to stop."""
        try:
            while True:
                self._forward_signals()
                while self._free and not self._received and (trial := self._source.next()) is not None:
                    self._start(trial, self._free.pop(0))
                for running in list(self._running):
                    self._poll(running)
                if not self._running and (self._received or self._source.exhausted):
                    return
                time.sleep(POLL_SECONDS)
        except BaseException:
            self._abandon()
            raise

    def _start(self, trial: Trial, slot: Slot) -> None:
        run_dir, log = self._sweep / trial.name, self._sweep / "logs" / f"{trial.name}.log"
        self._wait_for_earlier(trial, run_dir)
        if self._received:  # a signal came while this waited: the next start of the sweep takes the trial up
            self._free.append(slot)
            return
        record_before = read_record(record_path(self._sweep, trial.name))
        record = replace(
            record_before or Record(trial.name, trial.number, dict(trial.values)),
            status="running",
            reason="",
            place=slot.label,
            starts=(record_before.starts if record_before else 0) + 1,
        )
        write_record(self._sweep, record)
        (run_dir / PRUNE_FILE).unlink(missing_ok=True)
        trial_overrides = [*trial.overrides, f"run.dir={quoted(str(run_dir))}", f"run.name={quoted(trial.name)}"]
        cores = ",".join(map(str, slot.cores)) or "all"
        command = [*ENTRY, str(os.getpid()), cores, *self._common, *trial_overrides]
        env = child_environment({**os.environ, **self._variables, **slot.env})
        with files.append(log) as output:
            start = output.seek(0, os.SEEK_END)
            process = subprocess.Popen(
                command, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )
        self._running.append(Running(trial, slot, process, Metrics(run_dir), start, record))
        again = " again" if record.starts > 1 else ""
        self._console.stage(f"{trial.name} starts{again} on {slot.label}")

    def _wait_for_earlier(self, trial: Trial, run_dir: Path) -> None:
        """Wait until an earlier launch of the trial has ended.

        A sweep that was killed may leave trials that are still saving, and a run directory takes one launch at a time.
        """
        is_announced = False
        while not self._received and (earlier := records.read_launch(run_dir)) and earlier.process(run_dir) is not None:
            if not is_announced:
                self._console.message(
                    f"dstune: {trial.name} still runs as process {earlier.pid}: waiting for it to end"
                )
                is_announced = True
            self._forward_signals()
            for running in list(self._running):
                self._poll(running)
            time.sleep(POLL_SECONDS)

    def _forward_signals(self) -> None:
        if len(self._received) > self._announced_signals:
            self._announced_signals = len(self._received)
            consequence = (
                "trials save and stop; again to stop at once" if self._announced_signals == 1 else "trials stop at once"
            )
            self._console.message(f"dstune: received {self._received[-1]}: {consequence}")
        for running in self._running:
            while running.signals_sent < min(self._announced_signals, 2):
                # Two different signals: the same one twice within a moment counts once (`launch.signals`).
                running.process.send_signal((signal.SIGTERM, signal.SIGINT)[running.signals_sent])
                running.signals_sent += 1

    def _poll(self, running: Running) -> None:
        ended = running.process.poll() is not None  # before the metrics, which are then complete
        run_dir = self._sweep / running.trial.name
        rows = running.metrics.new()
        if (
            rows
            and not running.pruned
            and not running.signals_sent
            and (reason := self._source.watch(running.trial, rows))
        ):
            running.pruned, running.pruned_at = reason, time.monotonic()
            if not ended:
                files.write(run_dir / PRUNE_FILE, reason)  # atomically: ranks poll it
        if ended:
            self._conclude(running, run_dir)
        elif running.pruned and running.signals_sent < 2 and time.monotonic() - running.pruned_at > PRUNE_PATIENCE:
            running.process.send_signal((signal.SIGTERM, signal.SIGINT)[running.signals_sent])
            running.signals_sent += 1

    def _conclude(self, running: Running, run_dir: Path) -> None:
        self._running.remove(running)
        self._free.append(running.slot)
        code, status = running.process.returncode, status_in(run_dir)
        if running.pruned and status not in ("completed", "stopped", "pruned"):
            status = "pruned"
            result = records.read_result(run_dir) or {}
            records.write_json(records.result_path(run_dir), {**result, "status": status, "reason": running.pruned})
        (run_dir / PRUNE_FILE).unlink(missing_ok=True)
        if code not in (EXIT_DONE, EXIT_PREEMPTED) and status != "pruned":
            status = "failed"
        if not status or (code == EXIT_PREEMPTED and status != "pruned"):
            status = "preempted" if running.signals_sent or code == EXIT_PREEMPTED else "failed"
        reason = str((records.read_result(run_dir) or {}).get("reason") or "")
        if status == "failed" and (not reason or code not in (EXIT_DONE, EXIT_FAILED)):
            reason = self._error_message(running) or reason or f"it ended with exit code {code}"
        reached = self._source.ended(running.trial, status, run_dir)
        seconds = running.record.seconds + time.monotonic() - running.started
        record = replace(running.record, status=status, reason=reason, objective=reached, seconds=round(seconds, 1))
        write_record(self._sweep, record)
        values = ", ".join(f"{name} {value:.4g}" for name, value in reached.items())
        remark = f" ({reason.splitlines()[0]})" if reason else ""
        took = f" after {time.monotonic() - running.started:.0f} s"
        self._console.stage(f"{running.trial.name} {status}{took}{': ' * bool(values)}{values}{remark}")
        if status == "failed":
            self._console.message(f"dstune: its output is in {self._sweep / 'logs' / running.trial.name}.log")

    def _error_message(self, running: Running) -> str:
        """Return the error at the end of the log of a trial that left no result: the user's mistake, with key, value, reason and
        fix; else the log's last line."""
        lines = attempt.last_lines(self._sweep / "logs" / f"{running.trial.name}.log", running.log_start)
        error_line = max((number for number, line in enumerate(lines) if line.startswith("dstune: ")), default=-1)
        return "\n".join(lines[error_line:]).removeprefix("dstune: ")

    def _abandon(self) -> None:
        """Ask the trials to save and exit, because the sweep itself has failed."""
        if platform.system() == "Linux":
            return  # the kernel asks them when this process ends (`sweep.trial`); a second signal would keep them from saving
        for running in self._running:
            with contextlib.suppress(OSError):
                running.process.send_signal(signal.SIGTERM)
