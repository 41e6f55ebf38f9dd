"""Ends a rank that makes no progress, with its Python stacks in the log, instead of a silent wait for a time-out.

One rank that hangs makes all of them wait, and the launcher gets the stacks of those that are not asked in time, or cannot
run at all, by a signal (`answer_with_stacks`).
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
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
"""Parts of the paths of the files in which a rank waits for others."""

LAST_WORDS_SECONDS = 2.0
"""Between the stacks and the end: the other ranks stall at about the same time, and shall get to print theirs."""


def position() -> str:
    """Where the main thread is: the collective that it waits in, or the line of its program."""
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
"""How many times longer a phase without steps may take: saving, going back to a checkpoint, measuring a split."""


@dataclass(frozen=True)
class _Watched:
    """One object, so that the watching thread never holds the wait of one thing against the limit of another."""

    since: float
    limit: float
    doing: str


@callback
class Watchdog(Callback):
    """A thread that ends this process when nothing was reported for `seconds`; 0 never does.

    It sleeps until the training begins, and is patient in phases that have no steps.
    """

    name = "watchdog"
    order = 10

    def __init__(self, seconds: float, rank: int, report: Callable[[DstuneError], None] = lambda error: None):
        """report: hands the reason to whoever started the rank."""
        self._seconds, self._rank, self._report = seconds, rank, report
        self._now: _Watched | None = None
        self._closed = threading.Event()
        if seconds > 0:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    @classmethod
    def for_run(cls, run: Any) -> Watchdog:
        rank = run.world.rank
        return cls(run.config.trainer.stall_seconds, rank, partial(leave_error, run.run_dir, rank))

    def on_progress(self, doing: str) -> None:
        self._now = _Watched(time.monotonic(), self._seconds, doing)

    def on_train_begin(self, run: Run) -> None:
        self.on_progress(f"step {run.state.step + 1}")

    def on_micro_batch_begin(self, run: Run, step: Step, position: int, batch: Mapping[str, Any]) -> None:
        self.on_progress(f"micro-batch {position + 1} of step {step.number}")

    def between_steps(self, run: Run) -> None:
        self.on_progress(f"step {run.state.step + 1}")

    def while_waiting(self, run: Run) -> Request:
        self.on_progress(f"the wait for the rows of step {run.state.step + 1}")
        return CONTINUE

    def on_train_end(self, run: Run, request: Request) -> None:
        self._now = None

    def close(self) -> None:
        self._closed.set()

    @contextmanager
    def around(self, phase: str) -> Iterator[None]:
        """Allow PATIENCE times as long: a rank that hangs in it is found all the same."""
        before = self._now
        self._now = _Watched(time.monotonic(), self._seconds * PATIENCE, phase)
        try:
            yield
        finally:
            self._now = before and replace(before, since=time.monotonic())

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self._seconds / 4)):
            now = self._now
            if now is not None and time.monotonic() - now.since > now.limit:
                self._end(now)

    def _end(self, now: _Watched) -> None:
        waits, place = in_collective(), position()
        setting = "trainer.stall_seconds" if now.limit == self._seconds else f"{PATIENCE} times trainer.stall_seconds"
        text = f"rank {self._rank} made no progress for {now.limit:g} s ({setting}) in {now.doing}"
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
    """Whether this process waits for other ranks."""
    frames = sys._current_frames()
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    own = [frame for ident, frame in frames.items() if names.get(ident) not in ("watchdog", "feed", "checkpoint")]
    return any(part in path for frame in own for path in _files(frame) for part in COLLECTIVES)


def _files(frame: FrameType, depth: int = 6) -> list[str]:
    """The files of the innermost `depth` calls."""
    found: list[str] = []
    step: FrameType | None = frame
    while step is not None and len(found) < depth:
        found.append(step.f_code.co_filename)
        step = step.f_back
    return found


def answer_with_stacks() -> None:
    """From now on SIGQUIT prints the stacks of this process, even while it waits in native code."""
    faulthandler.register(signal.SIGQUIT, file=sys.__stderr__ or sys.stderr, all_threads=True)
