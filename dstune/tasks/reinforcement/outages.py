"""Tells failures that may pass, such as a judge that is down, from those that repeat, and asks again with growing pauses."""

from __future__ import annotations

import http.client
import socket
import time
import urllib.error
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

T = TypeVar("T")
Result = TypeVar("Result")

BUSY = (408, 425, 429)
"""Status codes after which the same request may succeed later, as after 500 and above."""
FIRST_PAUSE, LONGEST_PAUSE = 0.25, 10.0
"""Seconds before a failed request is repeated; each pause is twice the previous one."""
LONGEST_REASON = 500
"""Errors are cut off after this many characters."""
ATTEMPTS = 5
"""Attempts for a request that keeps failing while the same server answers others."""
PASSING = (ConnectionError, TimeoutError, http.client.HTTPException, socket.gaierror)
NAMES_OF_PASSING = {
    "APIConnectionError",  # openai, anthropic
    "ClientConnectionError",  # aiohttp
    "ConnectionError",  # requests
    "HTTPError",  # urllib3
    "ServerTimeoutError",
    "Timeout",
    "TransportError",  # httpx
}
"""Names of the classes with which clients that dstune does not import report a server that is down."""


class Failure(NamedTuple):
    """Why a reward could not score a completion."""

    reason: str
    may_pass: bool = False
    """Whether a later attempt may succeed."""

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        return cls(f"{type(error).__name__}: {error}"[:LONGEST_REASON], may_pass(error))


class Patience:
    """Repeats what fails in a way that may pass, with growing pauses."""

    def __init__(self, seconds: float):
        """seconds: how long a service that answers nothing is asked again; 0 for one attempt only."""
        self._seconds = seconds
        self.outage = ""
        """Why a service was given up; empty if none was. From then on nothing is repeated."""

    def ask(
        self, items: Sequence[T], ask: Callable[[Sequence[T]], Sequence[Result | Failure]]
    ) -> list[Result | Failure]:
        """Return a result, or a failure, for each of `items`. `ask` is repeated with those that failed in a way that may pass:
        until the time is up, or a few times if it had results for others."""
        results = list(ask(items))
        waiting = _passing(results)
        answers, deadline = len(waiting) < len(items), time.monotonic() + self._seconds
        for attempt, pause in enumerate(pauses(), start=2):
            if not waiting or not self._seconds or self.outage or (answers and attempt > ATTEMPTS):
                break
            if time.monotonic() + pause > deadline:
                if not answers:
                    self.outage = results[waiting[0]].reason  # type: ignore[union-attr]
                break
            time.sleep(pause)
            for number, result in zip(waiting, ask([items[number] for number in waiting]), strict=True):
                results[number] = result
            still_waiting = _passing(results)
            answers |= len(still_waiting) < len(waiting)
            waiting = still_waiting
        return results


def _passing(results: Sequence[object]) -> list[int]:
    return [number for number, result in enumerate(results) if isinstance(result, Failure) and result.may_pass]


def may_pass(error: BaseException) -> bool:
    """Return whether `error`, or an error that caused it, is the failure of a server that may answer later: it is down, too slow,
    busy, or answers with a status of 500 and above."""
    return any(_may_pass(cause) for cause in _chain(error))


def is_busy(code: int) -> bool:
    """Return whether a request that got this HTTP status may succeed later."""
    return code in BUSY or code >= 500


def pauses() -> Iterator[float]:
    """Yield the seconds to wait before each further attempt, without end."""
    pause = FIRST_PAUSE
    while True:
        yield pause
        pause = min(2 * pause, LONGEST_PAUSE)


def _may_pass(error: BaseException) -> bool:
    code = status_of(error)
    if code is not None:
        return is_busy(code)
    if isinstance(error, PASSING) or type(error) is urllib.error.URLError:
        return True
    return bool(NAMES_OF_PASSING & {kind.__name__ for kind in type(error).__mro__})


def status_of(error: BaseException) -> int | None:
    """Return the HTTP status that an error of urllib, requests, httpx, aiohttp or openai reports; None if it has none."""
    response = getattr(error, "response", None)
    candidates = (getattr(error, "code", None), getattr(error, "status_code", None), getattr(error, "status", None),
                  getattr(response, "status_code", None))  # fmt: skip
    return next((code for code in candidates if type(code) is int and 100 <= code < 1000), None)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error, and those that it was raised from or while handling."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
