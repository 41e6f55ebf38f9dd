"""Ends a rank that makes no progress, with its Python stacks in the log, instead of waiting silently for a time-out.

If one rank hangs, all others wait for it. The launcher uses a signal (`answer_with_stacks`) to get the stacks of the ranks whose
watchdog does not end them in time, or cannot run at all.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from types import FrameType
from typing import Any

from dstune.core.errors import EXIT_FAILED, DstuneError, Stalled, WaitedInVain
from dstune.core.rank_errors import leave_error
from dstune.protocols import callback
from dstune.protocols.callback import CONTINUE, Callback, Request, Run, Step

COLLECTIVES = ("torch/distributed/", "deepspeed/comm/")
"""Parts of file paths: a rank with such a file on its stack waits for other ranks."""

LAST_WORDS_SECONDS = 2.0
"""Pause between printing the stacks and exiting. The other ranks stall at about the same time, and get to print theirs."""


def position() -> str:
    """Describe where the main thread is: the collective that it waits in, or its line in dstune's code."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None:
        name = frame.f_code.co_name
        if frame.f_code.co_filename.endswith("distributed_c10d.py") and name != "wrapper" and not name.startswith("_"):
            return f"it waits in the collective {name}"
        if "/dstune/" in frame.f_code.co_filename:
            return f"it is in {name} ({os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno})"
        frame = frame.f_back
    return "its main thread has ended"


PATIENCE = 10
"""A phase without steps (saving, going back to a checkpoint, measuring a split) may take this many times longer."""
AUTO_SECONDS = 1800.0
"""With `trainer.stall_seconds=auto`, the limit of everything whose duration is unknown: evaluation, generation, the first steps."""
AUTO_STEPS, AUTO_LEAST_SECONDS, AUTO_FACTOR = 100, 120.0, 20.0
"""With `auto`, a step may take AUTO_FACTOR times as long as the slowest of the last AUTO_STEPS steps, at least
AUTO_LEAST_SECONDS."""
AUTO_AFTER_STEPS = 3
"""The first steps of a launch do not count: first collectives, compilation and allocators slow them down."""


@dataclass(frozen=True)
class _Watched:
    """The activity that is watched. Replaced as one object, so that the watching thread never compares the start of one activity
    with the limit of another."""

    since: float
    limit: float
    doing: str
    setting: str
    """The setting that the limit comes from, for the error."""


@callback
class Watchdog(Callback):
    """Ends this process, from a thread, if it has reported no progress for `seconds`; 0 turns it off.

    It does nothing before the first report, and allows more time in phases that have no steps.
    """

    name = "watchdog"
    order = 10

    def __init__(
        self,
        seconds: float | None,
        rank: int,
        report: Callable[[DstuneError], None] = lambda error: None,
        *,
        measures: bool = True,
    ):
        """seconds: None derives the limit from the duration of steps, if `measures`; a debugger, which may pause a step, needs it
        off. report: passes the error on to the process that started the rank."""
        self._seconds, self._rank, self._report = AUTO_SECONDS if seconds is None else seconds, rank, report
        self._setting = "trainer.stall_seconds" + "=auto" * (seconds is None)
        self._steps: deque[float] | None = deque(maxlen=AUTO_STEPS) if seconds is None and measures else None
        self._watched: _Watched | None = None
        self._closed = threading.Event()
        if self._seconds > 0:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    @classmethod
    def for_run(cls, run: Any) -> Watchdog:
        rank, seconds = run.world.rank, run.config.trainer.stall_seconds
        report = partial(leave_error, run.run_dir, rank)
        in_debugger = run.world.env.source == "in-process"
        return cls(seconds if isinstance(seconds, float) else None, rank, report, measures=not in_debugger)

    def on_progress(self, doing: str) -> None:
        self._watched = _Watched(time.monotonic(), self._seconds, doing, self._setting)

    def on_train_begin(self, run: Run) -> None:
        self._in_step(f"step {run.state.step + 1}")

    def on_micro_batch_begin(self, run: Run, step: Step, position: int, batch: Mapping[str, Any]) -> None:
        self._in_step(f"micro-batch {position + 1} of step {step.number}")

    def on_step_agreed(self, run: Run, step: Step) -> Request:
        if self._steps is not None and step.number_in_launch >= AUTO_AFTER_STEPS:
            self._steps.append(step.seconds)
        return CONTINUE

    def between_steps(self, run: Run) -> None:
        self._in_step(f"step {run.state.step + 1}")

    def while_waiting(self, run: Run) -> Request:
        self.on_progress(f"the wait for the rows of step {run.state.step + 1}")
        return CONTINUE

    def _in_step(self, doing: str) -> None:
        if not self._steps:
            self.on_progress(doing)
            return
        slowest = max(self._steps)
        limit = max(AUTO_LEAST_SECONDS, AUTO_FACTOR * slowest)
        setting = f"{self._setting}; the slowest of the last {len(self._steps)} steps took {slowest:.3g} s"
        self._watched = _Watched(time.monotonic(), limit, doing, setting)

    def on_train_end(self, run: Run, request: Request) -> None:
        self._watched = None

    def close(self) -> None:
        self._closed.set()

    @contextmanager
    def around(self, phase: str) -> Iterator[None]:
        """Allow the phase PATIENCE times the limit, so that a rank that hangs in it is ended too."""
        watched_before = self._watched
        limit, setting = self._seconds * PATIENCE, f"{PATIENCE} times {self._setting}"
        self._watched = _Watched(time.monotonic(), limit, phase, setting)
        try:
            yield
        finally:
            self._watched = watched_before and replace(watched_before, since=time.monotonic())

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self._seconds / 4)):
            watched = self._watched
            if watched is not None and time.monotonic() - watched.since > watched.limit:
                self._end(watched)

    def _end(self, watched: _Watched) -> None:
        waits, place = in_collective(), position()
        text = f"rank {self._rank} made no progress for {watched.limit:.4g} s ({watched.setting}) in {watched.doing}"
        error = (WaitedInVain if waits else Stalled)(f"{text}: {place}")
        try:
            self._report(error)
        except OSError as unwritable:
            print(f"dstune: {unwritable}", file=sys.stderr)
        print(f"dstune: {error}; the stacks of its threads:", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
        sys.stderr.flush()
        time.sleep(LAST_WORDS_SECONDS)
        os._exit(EXIT_FAILED)


def in_collective() -> bool:
    """Return whether this process waits for other ranks."""
    frames = sys._current_frames()
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    own_frames = [
        frame for ident, frame in frames.items() if names.get(ident) not in ("watchdog", "feed", "checkpoint")
    ]
    return any(part in path for frame in own_frames for path in _files(frame) for part in COLLECTIVES)


def _files(frame: FrameType, depth: int = 6) -> list[str]:
    """Return the files of the innermost `depth` calls."""
    files: list[str] = []
    step: FrameType | None = frame
    while step is not None and len(files) < depth:
        files.append(step.f_code.co_filename)
        step = step.f_back
    return files


def answer_with_stacks() -> None:
    """Make SIGQUIT print the stacks of this process, even while it waits in native code."""
    faulthandler.register(signal.SIGQUIT, file=sys.__stderr__ or sys.stderr, all_threads=True)
