"""One request: who it is from, its body, and what was told of it."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from typing import Any

from dstune.serve.asgi import Headers, Message, Receive, Scope, Send, dumps, read_body, respond
from dstune.serve.errors import ApiError
from dstune.serve.gateway.settings import Settings
from dstune.serve.store.keys import Caller

SECURITY = (
    (b"x-content-type-options", b"nosniff"),
    (b"cache-control", b"no-store"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
)


class SlowReader(Exception):
    """The client takes no more bytes."""


class Request:
    """An HTTP request with a response that can be begun once."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, settings: Settings):
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.settings = settings
        self.receive, self._send = receive, send
        self.id = f"req_{secrets.token_hex(16)}"
        self.began = time.monotonic()
        self.first_byte: float | None = None
        self.status = 0
        self.sent = 0
        self.caller: Caller | None = None
        self.model = ""
        self.version = ""
        self.user: str | None = None
        self.parameters: dict[str, str] = {}
        """What stands in the place of `{name}` in the route's path."""
        self._headers: dict[bytes, list[bytes]] = {}
        for name, value in scope["headers"]:
            self._headers.setdefault(name.lower(), []).append(value)

    def header(self, name: str) -> str:
        """The value; empty where there is none. Raises ApiError where there are several."""
        found = self._headers.get(name.encode(), [])
        if len(found) > 1:
            raise ApiError(400, f"The header {name} is there more than once.")
        return found[0].decode("latin-1") if found else ""

    # -- body

    async def json(self) -> dict[str, Any]:
        """The body. Raises ApiError for one that is too large, too slow, too deep, or no JSON object; ClientGone."""
        kind = self.header("content-type").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(415, "The body must be JSON: content-type application/json.")
        if self.header("content-encoding") not in ("", "identity"):
            raise ApiError(415, "The body must not be compressed.")
        limit = self.settings.max_body_bytes
        length = self.header("content-length")
        too_large = ApiError(413, f"The body has more than {limit} bytes.", code="request_too_large")
        if length and (not length.isdigit() or int(length) > limit):
            raise too_large
        try:
            async with asyncio.timeout(self.settings.body_seconds):
                body = await read_body(self.receive, limit)
        except ValueError:
            raise too_large from None
        except TimeoutError:
            raise ApiError(408, f"The body was not there after {self.settings.body_seconds:g} s.") from None
        try:
            value = json.loads(body.decode(), parse_constant=_refuse_constant)
        except (ValueError, RecursionError):
            raise ApiError(400, "The body is no JSON.") from None
        if not isinstance(value, dict):
            raise ApiError(400, "The body must be a JSON object.")
        if _deeper(value, self.settings.max_depth):
            raise ApiError(400, f"The body is nested more than {self.settings.max_depth} deep.")
        return value

    # -- response

    async def send(self, message: Message) -> None:
        """Raises SlowReader."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            own = [(b"x-request-id", self.id.encode()), *SECURITY]
            message = {**message, "headers": [*message["headers"], *own]}
        elif self.first_byte is None and message.get("body"):
            self.first_byte = time.monotonic() - self.began
        try:
            async with asyncio.timeout(self.settings.send_seconds):
                await self._send(message)
        except TimeoutError:
            raise SlowReader from None
        self.sent += len(message.get("body", b""))

    async def respond(self, status: int, body: bytes, headers: Headers = ()) -> None:
        await respond(self.send, status, body, headers)

    async def answer(self, value: Any) -> None:
        await self.respond(200, dumps(value))

    async def fail(self, error: ApiError) -> None:
        """Nothing where the response has begun."""
        if not self.status:
            headers = [(name.encode(), value.encode()) for name, value in error.headers.items()]
            await self.respond(error.status, error.body(), headers)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _deeper(value: Any, depth: int) -> bool:
    level = [value]
    for _ in range(depth):
        level = [
            item
            for one in level
            if isinstance(one, dict | list)
            for item in (one.values() if isinstance(one, dict) else one)
            if isinstance(item, dict | list)
        ]
        if not level:
            return False
    return True
