"""Saves and leaves when somebody asks for it: by a signal, a file in the run directory, or the end of the time."""

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
"""A signal to a whole process group or cgroup reaches a rank twice: directly, and through its launcher."""


@callback
class Preemption(Callback):
    """A signal (`run.signals`), the end of the time or a file named STOP in the run directory asks for a save after this
    step and exit 75; a file named SAVE for a save alone, one named PRUNE for the end without a save. A second signal ends
    at once, unless it comes within `SAME_REQUEST_SECONDS` of the first.

    The time is `run.time_limit`, or what SLURM says (SLURM_JOB_END_TIME); the save begins early enough to take
    `SAVES_BEFORE_DEADLINE` times as long as the last one.
    """

    name = "preemption"
    needs_loss_at_step_end = False
    order = 50

    def __init__(self, config: RunConfig, started: float, run_dir: Path, *, is_main: bool):
        """started: by `time.monotonic`, which no change of the clock moves. is_main: the rank that looks for the files
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
            # SIGTERM in any case: that is how the launcher forwards a signal.
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
        if self._files:  # the rank that writes what the run leaves behind
            refuse_if_superseded()
        if self._received is not None:
            return Request(Action.PREEMPT, f"received {self._first_received(self._received)}")
        for clock, deadline, reason in self._limits:
            # The next chance is a step away.
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
        """Return what the user or the scheduler sent, where the launching process forwarded it."""
        try:
            return self._forwarded.read_text() if name == "SIGTERM" else name
        except OSError:
            return name
