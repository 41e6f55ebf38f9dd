"""Admission control: how many requests run on the engines at once, how many wait, and the limits of a key."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, deque
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
USAGE_CACHE_SECONDS = 10.0
"""How long a daily token count from the database, which covers all gateways, is used before it is read again."""


@dataclass
class _Day:
    """A key's token usage today (UTC)."""

    number: int
    recorded: int
    """Recorded by all gateways, when the database was last read."""
    read_at: float
    since: int = 0
    """Used through this gateway since then."""
    unrecorded: int = 0
    """Used through this gateway without a row in the database (the guard's windows)."""


class Admission:
    """Allocates places to requests. Everything happens in one event loop."""

    def __init__(self, settings: Settings, metrics: Metrics, used: Callable[[str, int], Awaitable[int]]):
        """used: returns the tokens recorded for a key since a time (seconds since the epoch)."""
        self._settings, self._metrics, self._used = settings, metrics, used
        self._days: dict[str, _Day] = {}
        self._reading = asyncio.Lock()
        self._free_places = settings.concurrent
        self._line: dict[str, deque[asyncio.Future[None]]] = {}
        """Waiting requests by key; the key whose turn it is comes first."""
        self._waiting = 0
        self.active = 0
        self._of_key: Counter[str] = Counter()
        self._body_bytes: Counter[str] = Counter()
        self._per_minute = MovingWindowRateLimiter(MemoryStorage())

    async def check_rate(self, caller: Caller) -> None:
        """Count a request. Raises ApiError if it exceeds the key's rate limit."""
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
        """Return the key's usage today. It comes from the database, so that restarts and other gateways are included."""
        async with self._reading:
            number, day = int(time.time() // DAY), self._days.get(key)
            if day is not None and day.number == number and time.monotonic() - day.read_at <= USAGE_CACHE_SECONDS:
                return day
            if day is None or day.number != number:
                day = self._days[key] = _Day(number, 0, 0.0)
            day.recorded, day.since, day.read_at = day.recorded + day.since, 0, time.monotonic()
            try:
                day.recorded = await self._used(key, number * DAY)
            except Exception:  # until then, this gateway's own count is used
                log.exception("the tokens of a key could not be counted")
            return day

    def charge(self, caller: Caller, tokens: int, *, recorded: bool = False) -> None:
        """Count the tokens that a request used. recorded: whether they will also be in the database."""
        if caller.limit.tokens_per_day is None:
            return
        number, day = int(time.time() // DAY), self._days.get(caller.id)
        if day is None or day.number != number:
            day = self._days[caller.id] = _Day(number, 0, -USAGE_CACHE_SECONDS - 1)
        if recorded:
            day.since += tokens
        else:
            day.unrecorded += tokens

    def hold(self, caller: Caller, size: int) -> None:
        """Count bytes of a body that is read into memory. Raises ApiError if the key, or all keys together, exceed their limit."""
        if self._body_bytes[caller.id] + size > self._settings.key_body_bytes:
            most = self._settings.key_body_bytes
            self._refuse(f"The bodies of this key's requests may have {most} bytes together at once.", 1)
        if self._body_bytes.total() + size > self._settings.all_body_bytes:
            self._refuse("The server is busy: too many large requests.", 1)
        self._body_bytes[caller.id] += size

    def release(self, caller: Caller, size: int) -> None:
        """Give back the bytes that `hold` counted for an answered request."""
        self._body_bytes[caller.id] -= size
        if not self._body_bytes[caller.id]:
            del self._body_bytes[caller.id]

    @staticmethod
    def _refuse(message: str, seconds: float) -> None:
        headers = {"retry-after": str(max(1, round(seconds)))}
        raise ApiError(429, message, code="rate_limit_exceeded", headers=headers)

    @asynccontextmanager
    async def place(self, caller: Caller, receive: Receive) -> AsyncIterator[None]:
        """Wait for a place, and hold it within the block. receive: of the request, whose body has been read. Raises ApiError if too
        many requests wait, or this one waited too long; ClientGone."""
        most = caller.limit.concurrent
        if most is not None and self._of_key[caller.id] >= most:
            self._refuse(f"This key may have {most} requests at once.", 1)
        self._of_key[caller.id] += 1
        try:
            await self._take_place(caller.id, receive)
            self.active += 1
            self._metrics.active.set(self.active)
            try:
                yield
            finally:
                self.active -= 1
                self._metrics.active.set(self.active)
                self._free_place()
        finally:
            self._of_key[caller.id] -= 1
            if not self._of_key[caller.id]:
                del self._of_key[caller.id]

    async def _take_place(self, key: str, receive: Receive) -> None:
        """Take a place: at once if one is free, otherwise in turn with the other waiting keys."""
        if self._free_places:
            self._free_places -= 1
            return
        if self._waiting >= self._settings.queue:
            self._make_room(key)
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._line.setdefault(key, deque()).append(place)
        self._count_waiting(1)
        try:
            async with while_connected(receive), asyncio.timeout(self._settings.queue_seconds):
                await place
        except BaseException as error:
            if place.done() and not place.cancelled() and place.exception() is None:
                self._free_place()  # it was given a place while its client left
            elif place in self._line.get(key, ()):
                self._drop_waiting(key, place)
            if isinstance(error, TimeoutError):
                later = {"retry-after": "5"}
                raise ApiError(503, "The server is busy.", code="overloaded", headers=later) from None
            raise

    def _free_place(self) -> None:
        """Free a place, and pass it to the oldest request of the key whose turn it is."""
        while self._line:
            key = next(iter(self._line))
            place = self._line[key][0]
            self._drop_waiting(key, place)
            if waiting := self._line.pop(key, None):
                self._line[key] = waiting  # to the end of the line
            if not place.done():
                place.set_result(None)
                return
        self._free_places += 1

    def _make_room(self, key: str) -> None:
        """Make room in a full queue by dropping the newest request of the key with the most. Raises ApiError if that is this
        request."""
        busy = "The server is busy: too many requests wait."
        most = max(self._line, key=lambda waiting_key: len(self._line[waiting_key]), default=key)
        if len(self._line.get(most, ())) <= len(self._line.get(key, ())) + 1:
            self._refuse(busy, 1)
        place = self._line[most][-1]
        self._drop_waiting(most, place)
        if not place.done():
            place.set_exception(ApiError(429, busy, code="rate_limit_exceeded", headers={"retry-after": "1"}))

    def _drop_waiting(self, key: str, place: asyncio.Future[None]) -> None:
        self._line[key].remove(place)
        if not self._line[key]:
            del self._line[key]
        self._count_waiting(-1)

    def _count_waiting(self, change: int) -> None:
        self._waiting += change
        self._metrics.queued.set(self._waiting)
