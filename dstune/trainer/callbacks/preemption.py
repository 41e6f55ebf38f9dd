"""Saves and ends the launch on request: by a signal, by a file in the run directory, or at the time limit."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from dstune.config.schema import RunConfig
from dstune.core.lease import refuse_if_superseded
from dstune.core.paths import PRUNE_FILE, SAVE_FILE, SIGNAL_FILE, STOP_FILE, STOP_REASON
from dstune.core.rank_env import take_notices
from dstune.protocols import callback
from dstune.protocols.callback import CONTINUE, Action, Callback, Request, Run, Step

SAVES_BEFORE_DEADLINE = 3.0

SAME_REQUEST_SECONDS = 1.0
"""Signals within this time count as one: a signal to a process group or cgroup reaches a rank directly and through its launcher."""


@callback
class Preemption(Callback):
    """Handles requests to save or to end the run:

    - a signal of `run.signals`, the time limit, or a file STOP in the run directory: save after this step, exit with 75;
    - a file SAVE: save and go on;
    - a file PRUNE: end without saving;
    - a second signal: end at once, unless it comes within `SAME_REQUEST_SECONDS` of the first.

    The time limit is `run.time_limit` or SLURM's (SLURM_JOB_END_TIME), whichever comes first. The save begins early enough to take
    `SAVES_BEFORE_DEADLINE` times as long as the last one.
    """

    name = "preemption"
    needs_loss_at_step_end = False
    order = 50

    def __init__(self, config: RunConfig, started: float, run_dir: Path, *, is_main: bool):
        """started: by `time.monotonic`, which does not follow changes of the clock. is_main: whether this rank looks for the files
        and removes them."""
        minutes = config.run.time_limit
        self._limits: list[tuple[Callable[[], float], float, str]] = []
        if minutes is not None:
            reason = f"run.time_limit={minutes:g} minutes is over"
            self._limits.append((time.monotonic, started + 60 * minutes, reason))
        if (end := os.environ.get("SLURM_JOB_END_TIME", "")).isdigit():
            self._limits.append((time.time, float(end), "the time of the SLURM job is over"))
        self._files = (run_dir / PRUNE_FILE, run_dir / STOP_FILE, run_dir / SAVE_FILE) if is_main else ()
        self._forwarded = run_dir / "logs" / SIGNAL_FILE
        self._last_checked, self._step_seconds = time.monotonic(), 0.0
        self._received: str | None = None
        self._received_at = 0.0
        self._was_forwarded = False
        if threading.current_thread() is threading.main_thread():
            # Always SIGTERM too, since the launcher forwards every signal as SIGTERM.
            for name in {*config.run.signals, "SIGTERM"}:
                signal.signal(signal.Signals[name], self._receive)
            take_notices()

    @classmethod
    def for_run(cls, run: Any) -> Preemption:
        """Make the callback before anything else, so that a signal during start-up is not lost."""
        return run.preemption

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._received is not None:
            if now - self._received_at < SAME_REQUEST_SECONDS or self._is_forwarded(signal.Signals(number).name):
                return
            # The default action, delivered to ourselves: ends at once even inside a collective that will never return.
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self._received, self._received_at = signal.Signals(number).name, now

    def _is_forwarded(self, name: str) -> bool:
        """Return whether the launcher sends, as SIGTERM, the signal that this rank has already received by itself: SLURM signals
        the ranks of a job as well as the agents that started them."""
        if name != "SIGTERM" or self._was_forwarded:
            return False
        with suppress(OSError):
            self._was_forwarded = self._forwarded.read_text() == self._received
        return self._was_forwarded

    def on_step_end(self, run: Run, step: Step) -> Request:
        self._step_seconds = time.monotonic() - self._last_checked
        return self.while_waiting(run)

    def while_waiting(self, run: Run) -> Request:
        self._last_checked = time.monotonic()
        if self._files:  # only the main rank, which writes the run directory
            refuse_if_superseded()
        if self._received is not None:
            return Request(Action.PREEMPT, f"received {self._first_received(self._received)}")
        for clock, deadline, reason in self._limits:
            # The next check comes only after another step.
            if clock() + self._step_seconds + SAVES_BEFORE_DEADLINE * run.state.save_seconds >= deadline:
                return Request(Action.PREEMPT, reason)
        for file in self._files:
            if file.exists():
                if file.name == PRUNE_FILE:  # left for the sweep to remove
                    return Request(Action.PRUNE, file.read_text())
                file.unlink(missing_ok=True)
                stop = file.name == STOP_FILE
                return Request(Action.PREEMPT, STOP_REASON) if stop else Request(Action.SAVE)
        return CONTINUE

    def _first_received(self, name: str) -> str:
        """Return the name of the signal that the user or scheduler sent, if the launcher forwarded it as SIGTERM; else `name`."""
        try:
            return self._forwarded.read_text() if name == "SIGTERM" else name
        except OSError:
            return name
