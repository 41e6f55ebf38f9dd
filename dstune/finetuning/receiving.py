"""Limits concurrent uploads: places are shared among keys and projects, and a key without an upload is always admitted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from dstune.serve.errors import ApiError
from dstune.serve.store.keys import Caller

MOST_AT_ONCE = 64
"""Concurrent uploads: each takes a few MB of memory."""
MOST_OF_PROJECT = 48
MOST_OF_KEY = 32
MOST_FIRST = 512
"""Total number of uploads beyond which even a key's first one has to wait."""


class Receiving:
    """The running uploads. Everything happens in one event loop."""

    def __init__(self) -> None:
        self._keys: Counter[str] = Counter()
        self._projects: Counter[str] = Counter()

    @contextmanager
    def place(self, caller: Caller) -> Iterator[None]:
        """Hold a place during an upload. Raises ApiError 429 if the key, its project or the server has too many."""
        total, of_key, of_project = self._keys.total(), self._keys[caller.id], self._projects[caller.project]
        if of_key >= MOST_OF_KEY:
            raise _refused("This key sends too many files at once.")
        if of_key and of_project >= MOST_OF_PROJECT:
            raise _refused("This project sends too many files at once.")
        if total >= (MOST_AT_ONCE if of_key else MOST_FIRST):
            raise _refused("The server is receiving too many files.")
        self._keys[caller.id] += 1
        self._projects[caller.project] += 1
        try:
            yield
        finally:
            for counter, name in ((self._keys, caller.id), (self._projects, caller.project)):
                counter[name] -= 1
                if not counter[name]:
                    del counter[name]


def _refused(message: str) -> ApiError:
    return ApiError(429, message, code="rate_limit_exceeded", headers={"retry-after": "1"})
