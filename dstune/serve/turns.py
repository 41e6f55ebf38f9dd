"""Schedules work of several clients on few threads, with the clients in turn: a client with much work delays only itself."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Generic, TypeVar

CLIENT: ContextVar[str] = ContextVar("CLIENT", default="")
"""The client whose request the current task answers."""

T = TypeVar("T")


class Turns(Generic[T]):
    """A queue that is fair between clients. A client's own items keep their order; the clients take turns."""

    def __init__(self) -> None:
        self._waiting: dict[str, deque[T]] = {}
        self._busy: set[str] = set()
        """Clients whose item a thread works on."""
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
        with self.turn() as item:
            return item

    @contextmanager
    def turn(self) -> Iterator[T]:
        """Wait for the next item of a client that has no turn now, and yield it. The client has its turn within the block."""
        with self._changed:
            while (client := self._next_client()) is None:
                self._changed.wait()
            self._size -= 1
            items = self._waiting.pop(client)
            item = items.popleft()
            if items:  # to the end of the queue
                self._waiting[client] = items
            self._busy.add(client)
        try:
            yield item
        finally:
            with self._changed:
                self._busy.remove(client)
                self._changed.notify()

    def _next_client(self) -> str | None:
        return next((client for client in self._waiting if client not in self._busy), None)


class TurnThreads:
    """Threads that run work in the order of `Turns`. Of each client, they run one piece of work at a time."""

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
            with self._turns.turn() as (future, work):
                if future.set_running_or_notify_cancel():
                    try:
                        future.set_result(work())
                    except BaseException as error:
                        future.set_exception(error)
                del future, work  # an idle thread must not hold a request's body
