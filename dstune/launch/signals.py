"""Handles requests to stop that reach the launching process as signals."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from dstune.core import files
from dstune.core.paths import STOP_FILE
from dstune.launch.console import Console

SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")
"""Caught in addition to those of `run.signals`: whoever sends them does not want to leave orphaned ranks."""
TWICE_SECONDS = 0.25
"""The same signal within this time is the same request: coreutils' `timeout` sends its signal to the command and then
to the command's group, which delivers it twice."""


@contextmanager
def caught_signals(names: Sequence[str] = ("SIGUSR1",)) -> Iterator[list[str]]:
    """Collect names of requests to stop instead of acting on them. Signals that the parent ignores stay ignored (`nohup`,
    background jobs of a script)."""
    received: list[str] = []
    last = {"number": 0, "at": 0.0}

    def note(number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not (number == last["number"] and now - last["at"] < TWICE_SECONDS):
            received.append(signal.Signals(number).name)
        last.update(number=number, at=now)

    handler_before: dict[signal.Signals, Any] = {}
    for number in {signal.Signals[name] for name in (*SIGNALS, *names)}:
        if signal.getsignal(number) is not signal.SIG_IGN:
            handler_before[number] = signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in handler_before.items():
            signal.signal(number, handler)


class StopFile:
    """Asks ranks that no signal of this process reaches: the file STOP in the run directory, which they look for at each step."""

    def __init__(self, run_dir: Path, console: Console):
        self._file, self._console = run_dir / STOP_FILE, console
        self.signal: str | None = None
        """The first request: save and end."""
        self.forced = False
        """Whether a second request came, to end at once."""

    def look(self, received: Sequence[str]) -> None:
        """Look for the stop file. received: what `caught_signals` collects."""
        if received and self.signal is None:
            self.signal = received[0]
            files.write(self._file, "")
            then = "saving at the end of this step; again to stop at once without saving"
            self._console.message(f"dstune: received {self.signal}: {then}")
        if len(received) > 1 and not self.forced:
            self.forced = True
            self._console.message("dstune: received a second signal: stopping at once")

    def remove(self) -> None:
        self._file.unlink(missing_ok=True)
