"""Runs uvicorn on uvloop and httptools, with dstune's own signal handling.

uvicorn's signal handling would close the socket at once and exit with 143. uvloop and httptools use less CPU than asyncio's loop
and h11 (benchmarks/serving.py), and uvloop sends the head and the body of an answer together.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import resource
import signal
import socket
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol, TypeVar

import uvicorn
import uvloop
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

log = logging.getLogger("dstune.serve")

MOST_HEAD_BYTES = 65536
HEAD_SECONDS = 30.0
"""Time limit for a request's head, from the connection or from its first byte."""
BODY_REST_SECONDS = 5.0
"""Time limit for the rest of a body whose request has been answered."""
MOST_AHEAD = 64
"""Pipelined requests that may wait for the answer to an earlier one."""

T = TypeVar("T")


def run(main: Coroutine[Any, Any, T]) -> T:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main)


def allow_open_files() -> None:
    """Raise the soft limit of open files to the hard limit: each connection needs one."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def most_connections() -> int:
    """Return half of the files that this process may open: engines, databases and logs need some too."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return soft // 2 if soft > 0 else 1 << 20


class BoundedHttp(HttpToolsProtocol):
    """Limits what httptools accepts without limit: heads, chunk framing, trailers and pipelined requests."""

    _framing_bytes = 0
    """Framing bytes since the last byte of a body, or the end of a head."""
    _in_head = False
    _has_encoding = False
    _in_body = False
    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._close_after(HEAD_SECONDS)
        self._idle[self] = None
        if len(self.connections) > most_connections():
            next(iter(self._idle)).transport.abort()

    @property
    def _idle(self) -> dict[BoundedHttp, None]:
        """Connections of this server without a request, or with an incomplete head; the one that has waited longest comes first."""
        idle: dict[BoundedHttp, None] = self.server_state.__dict__.setdefault("idle", {})
        return idle

    def connection_lost(self, error: Exception | None) -> None:
        self._idle.pop(self, None)
        self._in_time()
        super().connection_lost(error)

    def data_received(self, data: bytes) -> None:
        self._framing_bytes += len(data)
        super().data_received(data)
        if self._framing_bytes > MOST_HEAD_BYTES:
            self.send_400_response("The head of the request is too large.")
        elif len(self.pipeline) > MOST_AHEAD:
            self.transport.close()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head, self._has_encoding, self._framing_bytes = True, False, 0
        if self._late is None:
            self._close_after(HEAD_SECONDS)

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_head:
            raise ValueError("a header after the head")  # the connection is closed
        if name.lower() == b"transfer-encoding":
            if self._has_encoding:
                raise ValueError("two transfer encodings")
            self._has_encoding = True
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head, self._in_body, self._framing_bytes = False, True, 0
        self._in_time()
        self._idle.pop(self, None)
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._framing_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._in_body = False
        self._in_time()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self.pipeline and not self.transport.is_closing():
            self._idle[self] = None
        if self._in_body and self.cycle.response_complete:
            self._close_after(BODY_REST_SECONDS)

    def send_400_response(self, message: str) -> None:
        """Close the connection without a response if one has begun: nothing may be sent within it."""
        if self.cycle is None or not (self.cycle.response_started or self.pipeline):
            super().send_400_response(message)
        else:
            self.transport.close()

    def _close_after(self, seconds: float) -> None:
        self._late = self.loop.call_later(seconds, self.transport.close)

    def _in_time(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None


def make_config(app: Any, **options: Any) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=BoundedHttp,
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        ws="none",
        **options,
    )


class Drains(Protocol):
    draining: bool


class Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve_until_signalled(server: Server, app: Drains, delay: float, sockets: list[socket.socket]) -> None:
    """Serve until SIGTERM or SIGINT. Then readiness answers 503 for `delay` seconds, so that load balancers stop sending requests;
    after that no connection is accepted, and running requests have uvicorn's `timeout_graceful_shutdown`. A second signal ends the
    server at once."""
    loop = asyncio.get_running_loop()
    signalled = asyncio.Event()

    def receive() -> None:
        if signalled.is_set():
            server.should_exit = server.force_exit = True
        signalled.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, receive)

    async def leave() -> None:
        await signalled.wait()
        app.draining = True
        log.info("draining: no new requests after %g s", delay)
        await asyncio.sleep(delay)
        server.should_exit = True

    gc.freeze()  # objects created at the start are permanent: scanning them would block the loop while a large body is parsed
    leaving = asyncio.create_task(leave())
    try:
        await server.serve(sockets)
    finally:
        leaving.cancel()
