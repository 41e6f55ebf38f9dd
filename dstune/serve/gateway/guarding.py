"""The protocol of a guard between clients and engines.

A guard sees every request before an engine does, and every answer before the client does.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any, Protocol

from dstune.serve.gateway.request import Request


class Guarded(Protocol):
    """A request that a guard has let through."""

    @property
    def body(self) -> dict[str, Any]:
        """The request as the engine may see it."""

    @property
    def looks_at_answers(self) -> bool: ...

    async def answer(self, content: bytes) -> bytes:
        """Return a complete answer as the client may see it. Raises ApiError if it is stopped."""
        ...

    def stream(self, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """Return the bytes of an event stream as the client may see them."""
        ...


class Guard(Protocol):
    counted: Callable[[str, str], None]
    """Called with what was checked and the decision."""

    @property
    def is_up(self) -> bool:
        """Whether the guard can check requests now."""

    async def request(self, request: Request, route: str, body: dict[str, Any]) -> Guarded | None:
        """Return the request as it may go on; None if no policy applies to it. Raises ApiError if it is stopped."""
        ...
