"""Decides whether a failed launch is restarted from the newest checkpoint (`launch.restarts`)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from dstune.checkpoint import store
from dstune.core import files
from dstune.core.errors import EXIT_FAILED, EXIT_PREEMPTED, TrainingFailed
from dstune.launch import records
from dstune.launch.console import Console
from dstune.launch.verdict import Verdict

SECOND_WAIT_SECONDS = 5.0
LONGEST_WAIT_SECONDS = 300.0
"""The first restart after training made progress is immediate, because most often a process has simply died. Each further wait is
twice as long as the previous one, because a fault of a node or a file system takes a while to pass."""


class HasLog(Protocol):
    """A launch whose ranks' last lines can be read."""

    def last_lines(self, rank: int, count: int = ...) -> list[str]: ...


@dataclass(frozen=True)
class Decision:
    """Whether and how a run continues after an attempt."""

    verdict: Verdict
    """Why the attempt ended, with a diagnosis if the same failure came twice."""
    wait: float | None = None
    """Seconds until the next attempt starts; None if there is none."""
    checkpoint: Path | None = None
    """Checkpoint that the next attempt continues from; None for the beginning."""


class Restarts:
    """Decides after each launch whether another one follows.

    allowed: `launch.restarts`. received: signals that ask the run to stop; a handler appends to it.
    """

    def __init__(self, allowed: int, run_dir: Path, console: Console, received: Sequence[str]):
        self._allowed, self._run_dir, self._console, self._received = allowed, run_dir, console, received
        self._failures: list[tuple[str, int]] = []
        self._failures_in_a_row = 0
        """Failures since the newest complete checkpoint was saved."""
        self._checkpoint: Path | None = None
        """The newest complete checkpoint at the last failure."""

    def consider(self, verdict: Verdict, launch: HasLog) -> tuple[Verdict, bool]:
        """Return the verdict, with a diagnosis if the same failure came twice, and whether to start again; wait until then."""
        decision = self.decide(verdict, launch)
        if decision.wait is None:
            return decision.verdict, False
        deadline = time.monotonic() + decision.wait
        while time.monotonic() < deadline:
            if self._received:
                if decision.checkpoint is None:
                    return verdict, False
                return Verdict(EXIT_PREEMPTED, f"received {self._received[0]} while waiting to start again"), False
            time.sleep(0.1)
        return verdict, True

    def decide(self, verdict: Verdict, launch: HasLog, *, is_external: bool = False) -> Decision:
        """Decide whether another attempt follows one that ended, announce it, and return at once.

        is_external: whether something other than the run caused the failure (a node was lost), so that it may recur at a step.
        """
        if verdict.exit_code != EXIT_FAILED:
            return Decision(verdict)
        if full := files.full_disk(self._run_dir):
            command = f"`dstune train {self._run_dir}`"
            reason = verdict.reason
            if command not in reason:
                reason += f"; {full}: free space, then run {command}"
            return Decision(replace(verdict, reason=reason, error=verdict.error or TrainingFailed(reason)))
        if self._received or not self._allowed:
            return Decision(verdict)
        # While an earlier stage of a run trains, its progress is in the folder of that stage.
        stage_folders = sorted(file.parent for file in self._run_dir.glob("*/metrics.jsonl"))
        stages = [records.read_metrics(folder).last for folder in (*stage_folders, self._run_dir)]
        step = int(next((row["step"] for row in reversed(stages) if "step" in row), 0))
        failure = (cause(verdict, launch), step)
        further = [failure[0]] if failure[0] != verdict.reason else []
        if failure in self._failures and not is_external:
            reason = f"{verdict.reason}; the same failure came twice after step {step}, so another start would not help"
            return Decision(replace(verdict, reason=": ".join([reason, *further])))
        self._failures.append(failure)
        number = len(self._failures)
        if number > self._allowed:
            restarts = f"started again {self._allowed} time{'s' * (self._allowed > 1)} (launch.restarts)"
            return Decision(replace(verdict, reason=f"{verdict.reason}; {restarts}"))
        checkpoint = next(filter(None, map(store.resumable, (self._run_dir, *reversed(stage_folders)))), None)
        wait = self._next_wait(checkpoint)
        start = f"from {checkpoint.name}" if checkpoint else "from the beginning"
        when = f" in {wait:.0f} s" if wait else ""
        self._console.message(
            f"dstune: {': '.join([verdict.reason, *further])}, after step {step}; starting again {start}{when} "
            f"({number} of {self._allowed} restarts)"
        )
        return Decision(verdict, wait, checkpoint)

    def _next_wait(self, checkpoint: Path | None) -> float:
        """Return the seconds until the next start. checkpoint: the newest complete one; a new one resets the count of failures."""
        former, self._checkpoint = self._checkpoint, checkpoint
        # The checkpoint may be older than the former one, if newer ones turned out to be damaged.
        if checkpoint and (former is None or checkpoint.parent != former.parent or checkpoint > former):
            self._failures_in_a_row = 0
        self._failures_in_a_row += 1
        if self._failures_in_a_row == 1:
            return 0.0
        return min(LONGEST_WAIT_SECONDS, SECOND_WAIT_SECONDS * 2 ** (self._failures_in_a_row - 2))


def cause(verdict: Verdict, launch: HasLog) -> str:
    """Return what identifies a failure: the exception, or the signal that killed the rank."""
    if verdict.error is not None or verdict.culprit is None or verdict.culprit.code < 0:
        return verdict.reason
    lines = [line.strip() for line in launch.last_lines(verdict.culprit.rank) if line.strip()]
    # The last line of a traceback that is not indented is the exception.
    return lines[-1] if lines else verdict.reason
