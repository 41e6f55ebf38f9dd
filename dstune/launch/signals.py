"""Requests to stop that reach the launching process as signals."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")
"""Caught beside those of `run.signals`: nobody who sends them wants the ranks to be orphans."""
TWICE_SECONDS = 0.25
"""The same signal within this time is the same request: coreutils' `timeout` sends its signal to the command and then
to the command's group, which delivers it twice."""


@contextmanager
def caught_signals(names: Sequence[str] = ("SIGUSR1",)) -> Iterator[list[str]]:
    """Collects names of requests to stop instead of acting on them. Signals that the parent ignores stay ignored
    (`nohup`, background jobs of a script)."""
    received: list[str] = []
    last = {"number": 0, "at": 0.0}

    def note(number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not (number == last["number"] and now - last["at"] < TWICE_SECONDS):
            received.append(signal.Signals(number).name)
        last.update(number=number, at=now)

    before: dict[signal.Signals, Any] = {}
    for number in {signal.Signals[name] for name in (*SIGNALS, *names)}:
        if signal.getsignal(number) is not signal.SIG_IGN:
            before[number] = signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
