"""How many requests engines get at once: some run, some wait, the others are refused. And what a key may ask."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from limits import RateLimitItemPerDay, RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import FixedWindowRateLimiter, MovingWindowRateLimiter

from dstune.serve.errors import ApiError
from dstune.serve.gateway.metrics import Metrics
from dstune.serve.gateway.settings import Settings
from dstune.serve.store.keys import Caller


class Admission:
    """Places for requests. Everything happens in one event loop."""

    def __init__(self, settings: Settings, metrics: Metrics):
        self._settings, self._metrics = settings, metrics
        self._places = asyncio.Semaphore(settings.concurrent)
        self._waiting = 0
        self.active = 0
        self._of_key: Counter[str] = Counter()
        storage = MemoryStorage()
        self._per_minute = MovingWindowRateLimiter(storage)
        self._per_day = FixedWindowRateLimiter(storage)

    def check_rate(self, caller: Caller) -> None:
        """Counts a request. Raises ApiError where it is one too many."""
        most = caller.limit.requests_per_minute
        if most is not None and not self._per_minute.hit(item := RateLimitItemPerMinute(most), caller.id):
            reset = self._per_minute.get_window_stats(item, caller.id).reset_time
            self._refuse(f"This key may send {most} requests a minute.", reset - time.time())
        tokens = caller.limit.tokens_per_day
        if tokens is not None and not self._per_day.test(item := RateLimitItemPerDay(tokens), caller.id):
            reset = self._per_day.get_window_stats(item, caller.id).reset_time
            self._refuse(f"This key may use {tokens} tokens a day.", reset - time.time())

    def charge(self, caller: Caller, tokens: int) -> None:
        """Count what a request has used."""
        if caller.limit.tokens_per_day is not None and tokens:
            self._per_day.hit(RateLimitItemPerDay(caller.limit.tokens_per_day), caller.id, cost=tokens)

    @staticmethod
    def _refuse(message: str, seconds: float) -> None:
        headers = {"retry-after": str(max(1, round(seconds)))}
        raise ApiError(429, message, code="rate_limit_exceeded", headers=headers)

    @asynccontextmanager
    async def place(self, caller: Caller) -> AsyncIterator[None]:
        """Raises ApiError where too many wait, or this one waited for too long."""
        most = caller.limit.concurrent
        if most is not None and self._of_key[caller.id] >= most:
            self._refuse(f"This key may have {most} requests at once.", 1)
        self._of_key[caller.id] += 1
        try:
            await self._enter()
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

    async def _enter(self) -> None:
        if self._places.locked():
            if self._waiting >= self._settings.queue:
                self._refuse("The server is busy: too many requests wait.", 1)
            self._waiting += 1
            self._metrics.queued.set(self._waiting)
            try:
                await asyncio.wait_for(self._places.acquire(), self._settings.queue_seconds)
            except TimeoutError:
                raise ApiError(503, "The server is busy.", code="overloaded", headers={"retry-after": "5"}) from None
            finally:
                self._waiting -= 1
                self._metrics.queued.set(self._waiting)
        else:
            await self._places.acquire()
        self.active += 1
        self._metrics.active.set(self.active)
