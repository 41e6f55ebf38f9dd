"""The way to an engine: HTTP/1.1 over connections that are kept open, answers as raw bytes.

A client of its own, since a general one (aiohttp) takes three times as long for a request, most of what the gateway adds to it.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections import deque
from collections.abc import AsyncIterator, Mapping
from typing import Any
from urllib.parse import urlsplit

import httptools

KEPT_SECONDS = 3.0
"""How long an idle connection may be used again. Engines close theirs after 5 s; a request that meets that would fail."""
CONNECT_SECONDS = 5.0
"""Between two chunks of an answer there is no limit: a first token may take minutes, and a client that goes ends the request."""
MOST_HEAD_BYTES = 1 << 20
MOST_WAITING = 1 << 18
"""Bytes that wait for whoever reads an answer; until they are taken, no more are read from the engine."""

FAILURES = (OSError,)
"""What is raised where an engine cannot be reached, or ends within an answer."""


class Answer:
    """An answer as it comes: its head is there, its body is read once. To be closed."""

    def __init__(self, connection: _Connection):
        self.status = 0
        self.headers: dict[str, str] = {}
        self._connection = connection
        self._parser: Any = httptools.HttpResponseParser(self)
        self._chunks: deque[bytes] = deque()
        self._waiting = self._head_bytes = 0
        self._to_end_of_connection = False
        self._changed: asyncio.Future[None] | None = None
        self._error: OSError | None = None
        self.whole = False
        self.leaves_open = False
        """Whether the connection may be asked again."""

    # -- read

    async def head(self) -> None:
        """Wait for status and headers. Raises one of FAILURES."""
        while not self.status:
            if self._error is not None:
                raise self._error
            await self._change()

    async def chunks(self) -> AsyncIterator[bytes]:
        """Raises one of FAILURES where the answer is cut."""
        while True:
            if self._chunks:
                found = self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)
                self._chunks.clear()
                self._waiting = 0
                self._connection.read_on()
                yield found
            elif self.whole:
                return
            elif self._error is not None:
                raise self._error
            else:
                await self._change()

    def close(self) -> None:
        """Whoever does not read on ends the connection, and so the engine's work."""
        self.fail("the answer was closed")

    async def _change(self) -> None:
        self._changed = asyncio.get_running_loop().create_future()
        try:
            await self._changed
        finally:
            self._changed = None

    def _wake(self) -> None:
        if self._changed is not None and not self._changed.done():
            self._changed.set_result(None)

    # -- of the connection

    def feed(self, data: bytes) -> None:
        if self._parser is None:
            return
        if not self.status:
            self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self.fail("the engine does not answer by HTTP")
        if self._head_bytes > MOST_HEAD_BYTES and not self.status:
            self.fail("the head of the engine's answer is too large")
        if self.whole or self._error is not None:
            self._parser = None  # each knows the other, and neither would go at once
        self._wake()

    def ended(self) -> None:
        """The connection is closed."""
        if self.status and self._to_end_of_connection:
            self.whole = True
            self._wake()
        else:
            self.fail("the engine has closed the connection")

    def fail(self, reason: str) -> None:
        if not self.whole and self._error is None:
            self._error = ConnectionError(reason)
            self._connection.close()
            self._wake()

    # -- of the parser

    def on_message_begin(self) -> None:
        if self.whole:  # more than one answer
            self.leaves_open = False

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self.whole:
            self.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if self.whole:
            return
        if status < 200:  # what comes before the answer
            self.headers.clear()
            return
        self.status = status
        self._to_end_of_connection = not (
            "content-length" in self.headers or "transfer-encoding" in self.headers or status in (204, 304)
        )

    def on_body(self, body: bytes) -> None:
        if not self.whole:
            self._chunks.append(body)
            self._waiting += len(body)
            if self._waiting > MOST_WAITING:
                self._connection.read_no_more()

    def on_message_complete(self) -> None:
        if self.status and not self.whole:
            self.whole, self.leaves_open = True, bool(self._parser.should_keep_alive())


class _Connection(asyncio.Protocol):
    def __init__(self, upstream: Upstream):
        self._upstream = upstream
        self._paused = False
        self.transport: asyncio.Transport | None = None
        self.answer: Answer | None = None
        self.idle_since = 0.0

    def ask(self, head_and_body: bytes) -> Answer:
        assert self.transport is not None
        self.answer = Answer(self)
        self.transport.write(head_and_body)
        return self.answer

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.transport = transport

    @property
    def usable(self) -> bool:
        fresh = time.monotonic() - self.idle_since < KEPT_SECONDS
        return fresh and self.transport is not None and not self.transport.is_closing()

    def data_received(self, data: bytes) -> None:
        if self.answer is None:  # nothing was asked
            self.close()
            return
        self.answer.feed(data)
        if self.answer.whole:
            answer, self.answer = self.answer, None
            self.read_on()
            if answer.leaves_open:
                self._upstream.keep(self)
            else:
                self.close()

    def connection_lost(self, error: Exception | None) -> None:
        self._upstream.forget(self)
        if self.answer is not None:
            self.answer.ended()

    def read_no_more(self) -> None:
        if self.transport is not None and not self._paused:
            self._paused = True
            self.transport.pause_reading()

    def read_on(self) -> None:
        if self.transport is not None and self._paused and not self.transport.is_closing():
            self._paused = False
            self.transport.resume_reading()

    def close(self) -> None:
        if self.transport is not None:
            self.transport.abort()
        self._upstream.forget(self)


class Upstream:
    """The server of one engine. To be made within an event loop."""

    def __init__(self, url: str, socket: str | None = None, headers: Mapping[str, str] | None = None):
        """url: without a path's last `/`. socket: a Unix socket that it listens on."""
        parts = urlsplit(url)
        self._path, self._socket = parts.path.rstrip("/"), socket
        self._host = parts.hostname or ""
        self._port = parts.port or (443 if parts.scheme == "https" else 80)
        self._context = ssl.create_default_context() if parts.scheme == "https" and not socket else None
        # Bytes are passed on as they come, so none may be compressed.
        given = {"host": parts.netloc.rpartition("@")[2], "accept-encoding": "identity", **(headers or {})}
        self._headers = "".join(f"{name}: {value}\r\n" for name, value in given.items())
        self._idle: deque[_Connection] = deque()
        self._open: set[_Connection] = set()
        self.closed = False

    async def send(self, method: str, path: str, body: bytes | None = None) -> Answer:
        """The answer as soon as its head is there; to be closed. Redirects are answers. Raises one of FAILURES."""
        sized = f"content-type: application/json\r\ncontent-length: {len(body)}\r\n" if body is not None else ""
        head = f"{method} {self._path}{path} HTTP/1.1\r\n{self._headers}{sized}\r\n".encode("latin-1")
        connection = self._kept() or await self._connected()
        answer = connection.ask(head + (body or b""))
        try:
            await answer.head()
        except BaseException:
            answer.close()
            raise
        return answer

    async def ask(self, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        """Status and content. Raises one of FAILURES."""
        answer = await self.send(method, path, body)
        try:
            return answer.status, b"".join([chunk async for chunk in answer.chunks()])
        finally:
            answer.close()

    async def close(self) -> None:
        self.closed = True
        for connection in list(self._open):
            connection.close()

    # -- connections

    def _kept(self) -> _Connection | None:
        """The connection that was used last, if it may still be used."""
        while self._idle:
            connection = self._idle.pop()
            if connection.usable:
                return connection
            connection.close()
        return None

    async def _connected(self) -> _Connection:
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(CONNECT_SECONDS):
            if self._socket is not None:
                _, made = await loop.create_unix_connection(lambda: _Connection(self), self._socket)
            else:
                _, made = await loop.create_connection(
                    lambda: _Connection(self), self._host, self._port, ssl=self._context
                )
        if self.closed:
            made.close()
            raise ConnectionError("the way to the engine is closed")
        self._open.add(made)
        return made

    def keep(self, connection: _Connection) -> None:
        connection.idle_since = time.monotonic()
        self._idle.append(connection)
        if connection.idle_since - self._idle[0].idle_since > KEPT_SECONDS:
            self._idle.popleft().close()

    def forget(self, connection: _Connection) -> None:
        self._open.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)
