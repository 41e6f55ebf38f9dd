"""Measures where the time from the command to the end of the first step goes."""

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
    """Divides the start-up time of this rank into named parts, seconds.

    `command`: from the start of the command to the start of this process (composition, checks, launch); only known if dstune
    itself started the ranks. `imports`: from there to the construction of this object (Python's libraries, and joining the other
    ranks). `mark` names the parts that follow.
    """

    name = "startup_timer"
    order = 12

    def __init__(self, env: Mapping[str, str] | None = None):
        """Start timing at the start of this process. env: names the process of the command. None: start timing now."""
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
        """Add the time since the last mark to `part`; parts with the same name add up."""
        if self._over:
            return
        now = time.clock_gettime(time.CLOCK_BOOTTIME)
        self._parts[part] = self._parts.get(part, 0.0) + now - self._last
        self._last = now

    def end(self, part: str) -> None:
        """Mark the last part, and ignore all later marks."""
        self.mark(part)
        self._over = True

    @property
    def seconds(self) -> dict[str, float]:
        return {name: round(seconds, 3) for name, seconds in self._parts.items()}


def _started(process: str) -> float | None:
    """Return when a process of this machine started, in seconds since the machine booted; None if that is not known."""
    if process != "self" and not process.isdigit():
        return None
    try:
        # proc(5), field 22, in clock ticks. The command's name, field 2, may hold anything, so fields are counted after its ")".
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return None
