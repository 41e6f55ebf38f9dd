"""How many requests engines get at once: some run, some wait, the others are refused. And what a key may ask."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter

from dstune.serve.asgi import Receive, while_connected
from dstune.serve.errors import ApiError
from dstune.serve.gateway.metrics import Metrics
from dstune.serve.gateway.settings import Settings
from dstune.serve.store.keys import Caller

log = logging.getLogger("dstune.serve")

DAY = 86400
KNOWN_SECONDS = 10.0
"""How long the tokens of a day that the database tells are taken for those of all gateways."""


@dataclass
class _Day:
    """What a key has used today (UTC)."""

    number: int
    recorded: int
    """By all gateways, as the database told."""
    read: float
    since: int = 0
    """By this gateway since then."""
    unrecorded: int = 0
    """By this gateway, of which the database knows nothing (the guard's windows)."""


class Admission:
    """Places for requests. Everything happens in one event loop."""

    def __init__(self, settings: Settings, metrics: Metrics, used: Callable[[str, int], Awaitable[int]]):
        """used: the tokens that are recorded of a key since a time (seconds of the epoch)."""
        self._settings, self._metrics, self._used = settings, metrics, used
        self._days: dict[str, _Day] = {}
        self._reading = asyncio.Lock()
        self._places = asyncio.Semaphore(settings.concurrent)
        self._waiting = 0
        self.active = 0
        self._of_key: Counter[str] = Counter()
        self._per_minute = MovingWindowRateLimiter(MemoryStorage())

    async def check_rate(self, caller: Caller) -> None:
        """Counts a request. Raises ApiError where it is one too many."""
        most = caller.limit.requests_per_minute
        if most is not None and not self._per_minute.hit(item := RateLimitItemPerMinute(most), caller.id):
            reset = self._per_minute.get_window_stats(item, caller.id).reset_time
            self._refuse(f"This key may send {most} requests a minute.", reset - time.time())
        tokens = caller.limit.tokens_per_day
        if tokens is None:
            return
        day = await self._day(caller.id)
        if day.recorded + day.since + day.unrecorded >= tokens:
            self._refuse(f"This key may use {tokens} tokens a day.", (day.number + 1) * DAY - time.time())

    async def _day(self, key: str) -> _Day:
        """What the key has used today: by the database, so that a restart and other gateways change nothing."""
        async with self._reading:
            number, day = int(time.time() // DAY), self._days.get(key)
            if day is not None and day.number == number and time.monotonic() - day.read <= KNOWN_SECONDS:
                return day
            if day is None or day.number != number:
                day = self._days[key] = _Day(number, 0, 0.0)
            day.recorded, day.since, day.read = day.recorded + day.since, 0, time.monotonic()
            try:
                day.recorded = await self._used(key, number * DAY)
            except Exception:  # what this gateway has counted is used until then
                log.exception("the tokens of a key could not be counted")
            return day

    def charge(self, caller: Caller, tokens: int, *, recorded: bool = False) -> None:
        """Count what a request has used. recorded: it will be in the database."""
        if caller.limit.tokens_per_day is None:
            return
        number, day = int(time.time() // DAY), self._days.get(caller.id)
        if day is None or day.number != number:
            day = self._days[caller.id] = _Day(number, 0, -KNOWN_SECONDS - 1)
        if recorded:
            day.since += tokens
        else:
            day.unrecorded += tokens

    @staticmethod
    def _refuse(message: str, seconds: float) -> None:
        headers = {"retry-after": str(max(1, round(seconds)))}
        raise ApiError(429, message, code="rate_limit_exceeded", headers=headers)

    @asynccontextmanager
    async def place(self, caller: Caller, receive: Receive) -> AsyncIterator[None]:
        """receive: of the request, whose body was read. Raises ApiError where too many wait, or this one waited for too long,
        ClientGone."""
        most = caller.limit.concurrent
        if most is not None and self._of_key[caller.id] >= most:
            self._refuse(f"This key may have {most} requests at once.", 1)
        self._of_key[caller.id] += 1
        try:
            await self._enter(receive)
            try:
                yield
            finally:
                self.active -= 1
                self._metrics.active.set(self.active)
                self._places.release()
        finally:
            self._of_key[caller.id] -= 1
            if not self._of_key[caller.id]:
                del self._of_key[caller.id]

    async def _enter(self, receive: Receive) -> None:
        if self._places.locked():
            if self._waiting >= self._settings.queue:
                self._refuse("The server is busy: too many requests wait.", 1)
            self._waiting += 1
            self._metrics.queued.set(self._waiting)
            try:
                async with while_connected(receive), asyncio.timeout(self._settings.queue_seconds):
                    await self._places.acquire()
            except TimeoutError:
                raise ApiError(503, "The server is busy.", code="overloaded", headers={"retry-after": "5"}) from None
            finally:
                self._waiting -= 1
                self._metrics.queued.set(self._waiting)
        else:
            await self._places.acquire()
        self.active += 1
        self._metrics.active.set(self.active)
