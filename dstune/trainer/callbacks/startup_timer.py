"""Where the time from the command to the end of the first step goes."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dstune.core.rank_env import LAUNCHER_PID
from dstune.protocols import callback
from dstune.protocols.callback import CONTINUE, Callback, Request, Run, Step

COMMAND, IMPORTS = "command", "imports"


@callback
class StartupTimer(Callback):
    """Seconds of this rank since its command was started, by what they were spent on.

    `command`: until this process was started (composing, checks, the launch; known where dstune started the ranks itself),
    `imports`: from there to this object, Python's libraries and the meeting with the other ranks. The rest is what `mark` names.
    """

    name = "startup_timer"
    order = 12

    def __init__(self, env: Mapping[str, str] | None = None):
        """Of this process, from its start on. env: with the process that was the command; None to count from now."""
        self._parts: dict[str, float] = {}
        self._over = False
        self._last = time.clock_gettime(time.CLOCK_BOOTTIME)
        if env is None:
            return
        started = _started("self")
        if started is None:
            return
        command = _started(env.get(LAUNCHER_PID, ""))
        if command is not None:
            self._parts[COMMAND] = max(0.0, started - command)
        self._parts[IMPORTS] = self._last - started

    @classmethod
    def for_run(cls, run: Any) -> StartupTimer:
        return run.startup

    def on_train_begin(self, run: Run) -> None:
        self.mark("evaluation")

    def on_step_begin(self, run: Run, step: Step) -> None:
        self.mark("first rows")

    def on_step_agreed(self, run: Run, step: Step) -> Request:
        self.end("first step")
        return CONTINUE

    def results(self) -> Mapping[str, Any]:
        return {"start_seconds": self.seconds}

    def mark(self, part: str) -> None:
        """Add the time since the last mark to this part; parts of one name add up."""
        if self._over:
            return
        now = time.clock_gettime(time.CLOCK_BOOTTIME)
        self._parts[part] = self._parts.get(part, 0.0) + now - self._last
        self._last = now

    def end(self, part: str) -> None:
        """Close the timer with the part of the first step, which is done; whatever is marked later does not count."""
        self.mark(part)
        self._over = True

    @property
    def seconds(self) -> dict[str, float]:
        return {name: round(seconds, 3) for name, seconds in self._parts.items()}


def _started(process: str) -> float | None:
    """Return when a process of this machine began, in seconds since the machine did; None where that is not known."""
    if process != "self" and not process.isdigit():
        return None
    try:
        # Behind the command's name, which may hold anything: the 20th field, in ticks (proc(5), field 22).
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return None
