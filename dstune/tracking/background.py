"""The thread of a tracker, so that it never holds up a run."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from dstune.core.errors import with_class
from dstune.protocols.tracker import Row, Tracker

MAX_WAITING = 10_000
"""Most rows that may wait for a tracker (a few MB); a tracker that is further behind counts as stuck."""


class Background:
    """Runs a tracker in its own thread: no call except `wait` waits for it, and none raises its exceptions.

    The first exception is reported through `report` and ends the tracker; the run goes on without it.
    """

    def __init__(self, tracker: Tracker, past: Callable[[], Iterator[Row]], report: Callable[[str], None]):
        self.name = tracker.title
        self._tracker = tracker
        self._report = report
        self._on = True
        self._actions: queue.Queue[Callable[[], None]] = queue.Queue(MAX_WAITING)
        self._thread = threading.Thread(target=self._work, name=tracker.title, daemon=True)

        def start() -> None:
            tracker.start(past())
            if location := tracker.location():
                report(f"{tracker.title}: {location}")

        self._do(start)
        self._thread.start()

    def write(self, row: Row, *, only_if_rebuilt: bool = False) -> None:
        self._do(lambda: None if only_if_rebuilt and not self._tracker.rebuilds else self._tracker.write(row))

    def summary(self, values: Mapping[str, Any]) -> None:
        self._do(lambda: self._tracker.summary(values))

    def finish(self, status: str) -> None:
        """Ask the tracker to finish, without waiting for it."""

        def end() -> None:
            self._tracker.finish(status)
            self._on = False

        self._do(end)

    def wait(self, deadline: float) -> None:
        """Wait for the end until `deadline` (of `time.monotonic`); work that is not done by then is abandoned."""
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._turn_off("it did not finish in time")

    def _do(self, action: Callable[[], None]) -> None:
        if not self._on:
            return
        try:
            self._actions.put_nowait(action)
        except queue.Full:
            self._turn_off(f"it is {MAX_WAITING:,} rows behind")

    def _work(self) -> None:
        while self._on:
            try:
                self._actions.get()()
            except BaseException as error:  # SystemExit too: some clients end the process where they find no key
                self._turn_off(with_class(error))

    def _turn_off(self, reason: str) -> None:
        if self._on:
            self._on = False
            self._report(f"warning: {self.name} is off for the rest of this run: {reason}")
