"""Schedules work of several clients on few threads, with the clients in turn: a client with much work delays only itself."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextvars import ContextVar
from typing import Any, Generic, TypeVar

CLIENT: ContextVar[str] = ContextVar("CLIENT", default="")
"""The client whose request the current task answers."""

T = TypeVar("T")


class Turns(Generic[T]):
    """A queue that is fair between clients. A client's own items keep their order; the clients take turns."""

    def __init__(self) -> None:
        self._waiting: dict[str, deque[T]] = {}
        self._changed = threading.Condition()
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def put(self, client: str, item: T) -> None:
        with self._changed:
            self._waiting.setdefault(client, deque()).append(item)
            self._size += 1
            self._changed.notify()

    def remove(self, client: str, item: T) -> None:
        """Remove an item that nobody waits for any more; no effect if its turn has come."""
        with self._changed:
            items = self._waiting.get(client, deque())
            if item in items:
                items.remove(item)
                self._size -= 1
                if not items:
                    del self._waiting[client]

    def get(self) -> T:
        """Wait for the next item and return it."""
        with self._changed:
            while not self._size:
                self._changed.wait()
            self._size -= 1
            client = next(iter(self._waiting))
            items = self._waiting.pop(client)
            item = items.popleft()
            if items:  # to the end of the queue
                self._waiting[client] = items
            return item


class TurnThreads:
    """Threads that run work in the order of `Turns`."""

    def __init__(self, name: str, threads: int = 1):
        self._turns: Turns[tuple[Future[Any], Callable[[], Any]]] = Turns()
        for _ in range(threads):
            threading.Thread(target=self._run, name=name, daemon=True).start()

    async def run(self, client: str, work: Callable[[], T]) -> T:
        """Return the result of `work`, or raise its error. It is not called if its caller gives up before its turn."""
        future: Future[T] = Future()
        item = (future, work)
        self._turns.put(client, item)
        try:
            return await asyncio.wrap_future(future)
        finally:
            self._turns.remove(client, item)

    def _run(self) -> None:
        while True:
            future, work = self._turns.get()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)
            del future, work  # an idle thread must not hold a request's body
