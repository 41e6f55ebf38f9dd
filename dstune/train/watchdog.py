"""Ends a rank that makes no progress, with its Python stacks in the log, instead of a silent wait for a time-out."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from dstune.errors import EXIT_FAILED

LAST_WORDS_SECONDS = 2.0
"""Between the stacks and the end: the other ranks stall at about the same time, and shall get to print theirs."""


def whereabouts() -> str:
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


class Watchdog:
    """A thread that ends this process when `beat` was not called for `seconds`; 0 never does.

    It sleeps until the loop begins to beat, and while something runs that may take any time (`paused`).
    """

    def __init__(self, seconds: float, rank: int):
        self._seconds, self._rank = seconds, rank
        self._last: float | None = None
        self._doing = ""
        if seconds > 0:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def beat(self, doing: str) -> None:
        """Progress was made; `doing` is what comes next."""
        self._doing, self._last = doing, time.monotonic()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Saving, exporting and generating may take any time."""
        watching, self._last = self._last is not None, None
        try:
            yield
        finally:
            self._last = time.monotonic() if watching else None

    def rest(self) -> None:
        """The loop has ended."""
        self._last = None

    def _watch(self) -> None:
        while True:
            time.sleep(min(1.0, self._seconds / 4))
            last = self._last
            if last is not None and time.monotonic() - last > self._seconds:
                self._end()

    def _end(self) -> None:
        print(
            f"dstune: rank {self._rank} made no progress for {self._seconds:g} s (trainer.stall_seconds) in {self._doing}: "
            f"{whereabouts()}; the stacks of its threads:",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
        sys.stderr.flush()
        time.sleep(LAST_WORDS_SECONDS)
        os._exit(EXIT_FAILED)
