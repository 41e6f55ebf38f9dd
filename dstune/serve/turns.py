"""Work of several clients on few threads, each client in turn: whoever brings much waits for its own work alone."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextvars import ContextVar
from typing import Any, Generic, TypeVar

CLIENT: ContextVar[str] = ContextVar("CLIENT", default="")
"""Whose request this task answers."""

T = TypeVar("T")


class Turns(Generic[T]):
    """A queue for threads. What a client has put comes in its order; of several clients one comes after the other."""

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
        """Take out what nobody waits for any more; nothing where its turn has come."""
        with self._changed:
            items = self._waiting.get(client, deque())
            if item in items:
                items.remove(item)
                self._size -= 1
                if not items:
                    del self._waiting[client]

    def get(self) -> T:
        """Wait for an item."""
        with self._changed:
            while not self._size:
                self._changed.wait()
            self._size -= 1
            client = next(iter(self._waiting))
            items = self._waiting.pop(client)
            item = items.popleft()
            if items:  # behind all others
                self._waiting[client] = items
            return item


class TurnThreads:
    """Threads that call what was put into turns."""

    def __init__(self, name: str, threads: int = 1):
        self._turns: Turns[tuple[Future[Any], Callable[[], Any]]] = Turns()
        for _ in range(threads):
            threading.Thread(target=self._run, name=name, daemon=True).start()

    async def run(self, client: str, work: Callable[[], T]) -> T:
        """Return what `work` returns or raises. Where nobody waits for it any more before its turn comes, it is not called."""
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
            del future, work  # an idle thread keeps no body
