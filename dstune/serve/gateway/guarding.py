"""What may stand between clients and engines: it sees every request before an engine does, and every answer before a client."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any, Protocol

from dstune.serve.gateway.request import Request


class Guarded(Protocol):
    """A request that was let through, and its answer."""

    @property
    def body(self) -> dict[str, Any]:
        """The request as an engine may see it."""

    @property
    def looks_at_answers(self) -> bool: ...

    async def answer(self, content: bytes) -> bytes:
        """Return a whole answer as a client may see it. Raises ApiError where it is stopped."""
        ...

    def stream(self, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """Return the bytes of a stream of events as a client may see them."""
        ...


class Guard(Protocol):
    counted: Callable[[str, str], None]
    """Told what was looked at, and the decision."""

    @property
    def is_up(self) -> bool:
        """Whether it can check requests now."""

    async def request(self, request: Request, route: str, body: dict[str, Any]) -> Guarded | None:
        """Return the request as it may go on; None where it is not looked at. Raises ApiError where it is stopped."""
        ...
