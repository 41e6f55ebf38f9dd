"""Runs long work in threads, with few threads per project, so that a project does not wait for many requests of another."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar
from weakref import WeakValueDictionary

from dstune.serve.errors import ApiError

MOST_WAITING = 64
"""Requests of a project that are waiting or running."""

P = ParamSpec("P")
T = TypeVar("T")


class Turns:
    def __init__(self, threads: int, name: str, *, of_project: int = 1):
        """of_project: the most threads of one project."""
        self._of_project = of_project
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=name)
        self._places: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()
        self._waiting: Counter[str] = Counter()

    async def run(self, project: str, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Return the result of a function that runs in a thread, after the project's earlier ones. Raises ApiError 429 if too many
        wait."""
        if self._waiting[project] >= MOST_WAITING:
            message = "Too many requests of this project wait here."
            raise ApiError(429, message, code="rate_limit_exceeded", headers={"retry-after": "1"})
        places = self._places.setdefault(project, asyncio.Semaphore(self._of_project))
        self._waiting[project] += 1
        try:
            async with places:
                loop = asyncio.get_running_loop()
                return await loop.run_in_executor(self._pool, lambda: function(*args, **kwargs))
        finally:
            self._waiting[project] -= 1
            if not self._waiting[project]:
                del self._waiting[project]
