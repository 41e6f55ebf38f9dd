"""What every tracker behind `log` has to do, and the thread that keeps it from ever holding up a run."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

MAX_WAITING = 10_000
"""Rows that may wait for a tracker (a few MB); one that is further behind is taken for stuck."""


@dataclass(frozen=True)
class Row:
    """Everything about one step."""

    step: int
    metrics: Mapping[str, Any]
    """Numbers and texts by name; null for a number that is not finite."""
    time: float
    """When the step was done, in seconds since the epoch."""
    samples: tuple[Mapping[str, Any], ...] = ()
    """Where prompts were answered at this step: all answers so far, each with its step."""


class Sink(Protocol):
    """A tracker. Called from one thread, in this order; may raise anything, which turns it off."""

    name: str
    rebuilds: bool
    """Whether every launch writes the whole run anew, from the files of the run directory. Another sink goes on where
    it was, and can add nothing to a step that it has. Known once `start` is done."""

    def start(self, past: Iterator[Row]) -> None:
        """Begin, or go on where an earlier launch of the run ended. past: the rows of the steps before this launch's
        first one, from the files of the run directory. Whatever is missing of them is to be written, and nothing else
        is to be there: rows of an earlier launch beyond its last checkpoint come again."""

    def write(self, row: Row) -> None:
        """One step; steps only rise."""

    def summary(self, values: Mapping[str, Any]) -> None:
        """The run's result: the keys of `result.json`."""

    def finish(self, status: str) -> None:
        """Close; `status` is that of `result.json`."""


class Background:
    """Runs a sink in a thread of its own: no call here waits for it, and nothing that it raises comes out.

    The first exception is told through `warn` and ends the sink; the run goes on without it.
    """

    def __init__(self, sink: Sink, past: Callable[[], Iterator[Row]], warn: Callable[[str], None]):
        self.name = sink.name
        self._sink = sink
        self._warn = warn
        self._on = True
        self._actions: queue.Queue[Callable[[], None]] = queue.Queue(MAX_WAITING)
        self._thread = threading.Thread(target=self._work, name=sink.name, daemon=True)
        self._do(lambda: sink.start(past()))
        self._thread.start()

    def write(self, row: Row, *, only_if_rebuilt: bool = False) -> None:
        self._do(lambda: None if only_if_rebuilt and not self._sink.rebuilds else self._sink.write(row))

    def summary(self, values: Mapping[str, Any]) -> None:
        self._do(lambda: self._sink.summary(values))

    def finish(self, status: str) -> None:
        """Ask for the end without waiting for it."""

        def end() -> None:
            self._sink.finish(status)
            self._on = False

        self._do(end)

    def wait(self, deadline: float) -> None:
        """Wait for the end until `deadline` (of `time.monotonic`); what is not done by then is left undone."""
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
                self._turn_off(f"{type(error).__name__}: {first_line(error)}")

    def _turn_off(self, reason: str) -> None:
        if self._on:
            self._on = False
            self._warn(f"warning: {self.name} is off for the rest of this run: {reason}")


def first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "")
