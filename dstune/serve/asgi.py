"""ASGI helpers shared by the gateway and the local engine."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, MutableMapping
from contextlib import asynccontextmanager
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Headers = Iterable[tuple[bytes, bytes]]

JSON = (b"content-type", b"application/json")
EVENTS = (b"content-type", b"text/event-stream; charset=utf-8")


class ClientGone(Exception):
    """The client closed its connection."""


async def respond(send: Send, status: int, body: bytes, headers: Headers = ()) -> None:
    """Send a complete response. headers: in addition to the content length; the content type is JSON if they name none."""
    all_headers = list(headers)
    if not any(name == b"content-type" for name, _ in all_headers):
        all_headers.append(JSON)
    all_headers.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": status, "headers": all_headers})
    await send({"type": "http.response.body", "body": body})


def dumps(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def event(value: Any) -> bytes:
    return b"data: " + dumps(value) + b"\n\n"


async def wait_for_disconnect(receive: Receive) -> None:
    """Wait until the client has closed its connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


@asynccontextmanager
async def while_connected(receive: Receive) -> AsyncIterator[None]:
    """Cancel the block if the client disconnects. Raises ClientGone then."""
    working = asyncio.current_task()
    assert working is not None
    has_left = False

    async def watch() -> None:
        nonlocal has_left
        await wait_for_disconnect(receive)
        has_left = True
        working.cancel()

    watching = asyncio.create_task(watch())
    try:
        yield
    except BaseException as error:
        # The cancellation may surface as any exception. If the task was cancelled a second time, that cancellation stands.
        if has_left and working.uncancel() == 0:
            raise ClientGone from error
        raise
    finally:
        watching.cancel()


async def read_body(receive: Receive, limit: int, hold: Callable[[int], None] = lambda size: None) -> bytes:
    """Read the complete body. hold: called with the size of each part. Raises ClientGone, ValueError if the body exceeds `limit`
    bytes, and what `hold` raises."""
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        part = message.get("body", b"")
        size += len(part)
        if size > limit:
            raise ValueError
        hold(len(part))
        parts.append(part)
        if not message.get("more_body"):
            return b"".join(parts)
