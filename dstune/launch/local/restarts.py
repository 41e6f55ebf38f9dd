"""Whether a launch that failed is tried again from the newest checkpoint (`launch.restarts`)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from dstune.checkpoint import store
from dstune.core.errors import EXIT_FAILED, EXIT_PREEMPTED
from dstune.launch import records
from dstune.launch.console import Console
from dstune.launch.verdict import Verdict

FIRST_WAIT_SECONDS = 5.0
LONGEST_WAIT_SECONDS = 300.0
"""Each wait is twice the one before: what broke a node or a file system takes a while to pass."""


class HasLog(Protocol):
    """What is needed of a launch that ended."""

    def last_lines(self, rank: int, count: int = ...) -> list[str]: ...


class Restarts:
    """Decides after each launch. received: signals asking to stop, filled by a handler."""

    def __init__(self, allowed: int, run_dir: Path, console: Console, received: Sequence[str]):
        self._allowed, self._run_dir, self._console, self._received = allowed, run_dir, console, received
        self._failures: list[tuple[str, int]] = []

    def consider(self, verdict: Verdict, launch: HasLog) -> tuple[Verdict, bool]:
        """The verdict, with the diagnosis where failures repeat, and whether to start again (after the wait)."""
        if verdict.exit_code != EXIT_FAILED or self._received or not self._allowed:
            return verdict, False
        # A run with a stage before its own has its progress in a folder of that stage until it is done.
        before = sorted(file.parent for file in self._run_dir.glob("*/metrics.jsonl"))
        stages = [records.read_metrics(folder).last for folder in (*before, self._run_dir)]
        step = int(next((row["step"] for row in reversed(stages) if "step" in row), 0))
        failure = (cause(verdict, launch), step)
        if failure in self._failures:
            reason = f"{verdict.reason}; the same failure came twice after step {step}, so another start would not help"
            return replace(verdict, reason=f"{reason}: {failure[0]}"), False
        self._failures.append(failure)
        number = len(self._failures)
        if number > self._allowed:
            tried = f"started again {self._allowed} time{'s' * (self._allowed > 1)} (launch.restarts)"
            return replace(verdict, reason=f"{verdict.reason}; {tried}"), False
        wait = min(LONGEST_WAIT_SECONDS, FIRST_WAIT_SECONDS * 2 ** (number - 1))
        checkpoint = next(filter(None, map(store.resumable, (self._run_dir, *reversed(before)))), None)
        start = f"from {checkpoint.name}" if checkpoint else "from the beginning"
        self._console.message(
            f"dstune: {verdict.reason} after step {step} ({failure[0]}); starting again {start} in {wait:.0f} s "
            f"({number} of {self._allowed} restarts)"
        )
        deadline = time.monotonic() + wait
        while time.monotonic() < deadline:
            if self._received:
                if checkpoint is None:
                    return verdict, False
                return Verdict(EXIT_PREEMPTED, f"received {self._received[0]} while waiting to start again"), False
            time.sleep(0.1)
        return verdict, True


def cause(verdict: Verdict, launch: HasLog) -> str:
    """What tells one failure from another: the exception, or the signal that killed the rank."""
    if verdict.error is not None or verdict.culprit is None or verdict.culprit.code < 0:
        return verdict.reason
    lines = [line.strip() for line in launch.last_lines(verdict.culprit.rank) if line.strip()]
    # The last line of a traceback that is not indented is the exception.
    return lines[-1] if lines else verdict.reason
