"""A request: its caller, its body, and its response."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import secrets
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterable
from typing import Any, TypeVar, cast
from urllib.parse import parse_qsl

from starlette import requests

from dstune.serve.asgi import (
    JSON,
    ClientGone,
    Headers,
    Message,
    Receive,
    Scope,
    Send,
    dumps,
    read_body,
    respond,
    while_connected,
)
from dstune.serve.errors import ApiError
from dstune.serve.gateway.json_bounds import excess_of
from dstune.serve.gateway.settings import Settings
from dstune.serve.store.keys import Caller
from dstune.serve.turns import TurnThreads

SECURITY = (
    (b"x-content-type-options", b"nosniff"),
    (b"cache-control", b"no-store"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
)


EXPOSED = b"x-request-id, retry-after, openai-organization, openai-processing-ms, openai-version"
"""Response headers that pages of other sites may read."""

UNREAD_BYTES = 786_432
"""How much of a refused body is still read."""


_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
"""An escaped surrogate in JSON. A pair of them stands for a character; one alone is not text and cannot be passed on."""

LARGE_BYTES = 262_144
"""Larger bodies are parsed and checked in a thread."""

LINGER_SECONDS = 0.5
DISCARD_SECONDS = 5.0
LEAST_BYTES_A_SECOND = 1024
"""Minimum rate of a body that arrives in pieces, after its first `body_seconds`."""


_NOT_IN_HEADER = re.compile(r"[^ -~]")
"""Characters replaced in header values: a line break in a client's value would begin a header that the client chooses."""


T = TypeVar("T")


class SlowReader(Exception):
    """The client has stopped reading the response."""


class Request(requests.Request):
    """Starlette's request with limits on what is read, and a response that can be started once."""

    def __init__(
        self, scope: Scope, receive: Receive, send: Send, settings: Settings, threads: TurnThreads | None = None
    ):
        """threads: run the slow work on large bodies."""
        super().__init__(scope, self._note_end, self._send_noted)
        self.path: str = scope["path"]
        self.settings = settings
        self._receive_message, self._send_message, self._threads = receive, send, threads
        self.memory: Callable[[int], None] = lambda size: None
        """Called with the size of each part of a body that is read into memory. Raises ApiError if the limit is exceeded."""
        self.held_bytes = 0
        self._body_ended = False
        self._unread = UNREAD_BYTES
        self._may_have_lone_surrogates = False
        self.id = f"req_{secrets.token_hex(16)}"
        self.began = time.monotonic()
        self.first_byte: float | None = None
        self.status = 0
        self.bytes_sent = 0
        self.caller: Caller | None = None
        self.model = ""
        self.alias = ""
        """The name that the client requested, if it stands for several models."""
        self.version = ""
        self.end_user: str | None = None
        self.safety_identifier: str | None = None
        """The other name of the user, if the request has both."""
        """The end user that the client names."""
        self.label = "none"
        """Its route's path, for metrics and the log."""
        self.plain_errors = False
        """Whether this client reads the error's message at the top level, not inside `error`."""
        self._notes: dict[bytes, list[str]] = {}
        """Extra response headers."""
        self.allowed_origin = ""
        """The site of a page that may read the answer."""
        self.digest = ""
        """SHA-256 of the JSON body."""
        self.body_bytes = 0
        """Size of the JSON body."""
        self.repeatable = True
        """Whether the client may retry automatically after a server error."""
        self._values: dict[bytes, list[bytes]] = {}
        for name, value in scope["headers"]:
            self._values.setdefault(name.lower(), []).append(value)

    @staticmethod
    def from_scope(scope: Scope) -> Request:
        """Return the request that the gateway created for this scope."""
        return cast(Request, scope["dstune.request"])

    @property
    def parameters(self) -> dict[str, str]:
        """The values of `{name}` in the route's path."""
        return self.path_params

    @property
    def key(self) -> Caller:
        """The caller whose key the request has, on a route that requires a key."""
        assert self.caller is not None
        return self.caller

    def header(self, name: str) -> str:
        """Return the value of a header; empty if it is absent. Raises ApiError if it occurs several times."""
        values = self._values.get(name.encode(), [])
        if len(values) > 1:
            raise ApiError(400, f"The header {name} occurs more than once.")
        return values[0].decode("latin-1") if values else ""

    def query(
        self, names: Collection[str], *, families: Collection[str] = (), lists: Collection[str] = ()
    ) -> dict[str, str]:
        """Return the query parameters. names: plain names. families: names of the form `NAME[KEY]`. lists: names of the form
        `NAME[]`, whose values `query_values` returns. Raises ApiError for any other parameter, and for one that occurs twice."""
        value_by_name: dict[str, str] = {}
        for name, value in self._parameters():
            family = name.partition("[")[0] if name.endswith("]") else None
            if name.endswith("[]") and name[:-2] in lists:
                continue
            if name not in names and (family not in families or name.endswith("[]")):
                raise ApiError(400, f"Unknown parameter: {name[:80]!r}.", param=name[:80], code="unknown_parameter")
            if name in value_by_name:
                raise ApiError(400, f"The parameter {name[:80]!r} occurs twice.", param=name[:80])
            value_by_name[name] = value
        return value_by_name

    def query_values(self, name: str) -> list[str]:
        """Return the values of a parameter that may occur several times."""
        return [value for parameter, value in self._parameters() if parameter == name]

    def _parameters(self) -> list[tuple[str, str]]:
        try:
            parameters = parse_qsl(
                self.scope.get("query_string", b"").decode(),
                keep_blank_values=True,
                max_num_fields=100,
                errors="strict",
            )
        except ValueError:
            parameters = [("\0", "")]
        if any("\0" in name or "\0" in value for name, value in parameters):
            raise ApiError(400, "The query is not valid.")
        return parameters

    # -- body

    async def _note_end(self) -> Message:
        message = await self._receive_message()
        if message["type"] != "http.request" or not message.get("more_body"):
            self._body_ended = True
        return message

    async def _leave_body(self) -> bool:
        """Return whether the client still sends an unread body; the connection is closed then. A small body is read to its end, so
        that the client sees the answer and keeps the connection."""
        lengths = self._values.get(b"content-length", [b""])
        if b"expect" in self._values or any(
            len(length) > 12 or (length.isdigit() and int(length) > UNREAD_BYTES) for length in lengths
        ):
            self._unread = 0
        await self._discard(1.0)
        return not self._body_ended

    async def _discard(self, seconds: float) -> None:
        """Read and discard for at most `seconds`, while the client sends little enough."""
        try:
            async with asyncio.timeout(seconds):
                while not self._body_ended and self._unread > 0:
                    self._unread -= len((await self.receive()).get("body", b""))
        except TimeoutError:
            pass

    async def chunks(self, limit: int) -> AsyncIterator[bytes]:
        """Yield the body as it arrives. Raises ApiError if it exceeds `limit` bytes or stalls; ClientGone."""
        too_large = ApiError(413, f"The body has more than {limit} bytes.", code="request_too_large")
        length = self.header("content-length")
        if length and (not length.isdigit() or len(length) > 18 or int(length) > limit):
            raise too_large
        size, began = 0, time.monotonic()
        while True:
            try:
                async with asyncio.timeout(self.settings.body_seconds):
                    message = await self.receive()
            except TimeoutError:
                raise ApiError(408, f"Nothing of the body arrived for {self.settings.body_seconds:g} s.") from None
            seconds = time.monotonic() - began
            if seconds > self.settings.body_seconds and size < seconds * LEAST_BYTES_A_SECOND:
                raise ApiError(408, f"The body arrives at less than {LEAST_BYTES_A_SECOND} bytes per second.")
            if message["type"] == "http.disconnect":
                raise ClientGone
            part: bytes = message.get("body", b"")
            size += len(part)
            if size > limit:
                raise too_large
            if part:
                yield part
            if not message.get("more_body"):
                return

    async def json(self) -> dict[str, Any]:
        """Return the body. Raises ApiError if it is too large, too slow, too deep, or not a JSON object; ClientGone."""
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
                body = await read_body(self.receive, limit, self._hold)
        except ValueError:
            raise too_large from None
        except TimeoutError:
            raise ApiError(408, f"The body did not arrive within {self.settings.body_seconds:g} s.") from None
        self.body_bytes = len(body)
        return await self.run_in_thread(lambda: self._parsed(body))

    def _hold(self, size: int) -> None:
        self.memory(size)
        self.held_bytes += size

    async def run_in_thread(self, work: Callable[[], T]) -> T:
        """Return the result of `work` on the body. For a large body it runs in a thread, where the keys take turns. Raises what
        `work` raises, ClientGone."""
        if self.body_bytes <= LARGE_BYTES or self._threads is None:
            return work()
        async with while_connected(self.receive):
            return await self._threads.run(self.caller.id if self.caller is not None else "", work)

    def _parsed(self, body: bytes) -> dict[str, Any]:
        if excess := excess_of(body, self.settings.max_depth):
            raise ApiError(400, f"The body {excess}.")
        self.digest = hashlib.sha256(body).hexdigest()
        self._may_have_lone_surrogates = bool(_SURROGATE.search(body))
        try:
            value = json.loads(body.decode(), parse_constant=_refuse_constant)
        except (ValueError, RecursionError):
            raise ApiError(400, "The body is not valid JSON.") from None
        if not isinstance(value, dict):
            raise ApiError(400, "The body must be a JSON object.")
        return value

    def refuse_halves(self, body: dict[str, Any]) -> None:
        """Raises ApiError if a text in the body contains half of a surrogate pair, which cannot be passed on."""
        if self._may_have_lone_surrogates:
            try:
                dumps(body)
            except UnicodeEncodeError:
                raise ApiError(400, "The body contains half of a character (a lone surrogate).") from None

    # -- response

    def note(self, header: bytes, values: Iterable[str]) -> None:
        """Add a response header, with each value once. No effect once the response has begun."""
        header_values = self._notes.setdefault(header, [])
        header_values += [value for value in dict.fromkeys(values) if value not in header_values]

    @property
    def send(self) -> Send:
        return self._send

    async def _send_noted(self, message: Message) -> None:
        """Send a message of the response with the gateway's headers, and note status, size and the time of the first byte. Raises
        SlowReader."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            own_headers = [(b"x-request-id", self.id.encode()), *self._service(), *SECURITY]
            own_headers += [
                (name, _NOT_IN_HEADER.sub("?", ", ".join(values)).encode())
                for name, values in self._notes.items()
                if values
            ]
            message = {**message, "headers": [*message["headers"], *own_headers]}
        elif self.first_byte is None and message.get("body"):
            self.first_byte = time.monotonic() - self.began
        try:
            async with asyncio.timeout(self.settings.send_seconds):
                await self._send_message(message)
        except TimeoutError:
            raise SlowReader from None
        self.bytes_sent += len(message.get("body", b""))

    def _service(self) -> Headers:
        milliseconds = round(1000 * (time.monotonic() - self.began))
        yield b"openai-processing-ms", str(milliseconds).encode()
        yield b"openai-version", b"2020-10-01"
        if self.caller is not None:
            yield b"openai-organization", self.caller.organization.encode()
        if self.allowed_origin:
            yield b"access-control-allow-origin", self.allowed_origin.encode("latin-1")
            yield b"access-control-expose-headers", EXPOSED
            yield b"vary", b"origin"

    async def respond(self, status: int, body: bytes, headers: Headers = ()) -> None:
        await respond(self.send, status, body, headers)

    async def answer(self, value: Any) -> None:
        await self.respond(200, dumps(value))

    async def _answer_and_close(self, error: ApiError, headers: list[tuple[bytes, bytes]]) -> None:
        """Answer and close. The connection stays open until a small body has arrived: if it were closed while its client writes,
        the client might lose the answer."""
        body = self._error_body(error)
        fixed = [JSON, (b"content-length", str(len(body)).encode()), (b"connection", b"close")]
        await self.send({"type": "http.response.start", "status": error.status, "headers": [*headers, *fixed]})
        await self.send({"type": "http.response.body", "body": body, "more_body": True})
        await self._discard(DISCARD_SECONDS)
        if not self._body_ended:
            await asyncio.sleep(LINGER_SECONDS)
        await self.send({"type": "http.response.body", "body": b""})

    async def fail(self, error: ApiError) -> None:
        """Answer with the error; do nothing if the response has begun."""
        if not self.status:
            headers = [(name.encode(), value.encode()) for name, value in error.headers.items()]
            # Clients retry 408, 409 and 5xx unless told not to.
            if error.status == 409 or (not self.repeatable and (error.status >= 500 or error.status == 408)):
                headers.append((b"x-should-retry", b"false"))
            if await self._leave_body():
                await self._answer_and_close(error, headers)
            else:
                await self.respond(error.status, self._error_body(error), headers)

    def _error_body(self, error: ApiError) -> bytes:
        return error.plain() if self.plain_errors else error.body()


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
