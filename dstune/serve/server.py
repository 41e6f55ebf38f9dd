"""uvicorn without its own idea of signals (it would close the socket at once and end with 143), on uvloop and httptools.

Both cost less than asyncio's own loop and h11 (benchmarks/serving.py), and uvloop sends the head and the body of an answer at once.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import uvicorn
import uvloop
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

log = logging.getLogger("dstune.serve")

MOST_HEAD_BYTES = 65536
HEAD_SECONDS = 30.0
"""From the connection, or the first byte of a request, to the end of its head."""

T = TypeVar("T")


def run(main: Coroutine[Any, Any, T]) -> T:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main)


class BoundedHttp(HttpToolsProtocol):
    """Heads of requests have to be small and soon there: httptools itself takes any."""

    _head_bytes = 0
    _in_head = False
    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._late = self.loop.call_later(HEAD_SECONDS, transport.close)

    def connection_lost(self, error: Exception | None) -> None:
        self._in_time()
        super().connection_lost(error)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._in_head:
            self._head_bytes += len(data)
            if self._head_bytes > MOST_HEAD_BYTES:
                self.send_400_response("The head of the request is too large.")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head, self._head_bytes = True, 0
        if self._late is None:
            self._late = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._in_time()
        super().on_headers_complete()

    def _in_time(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None


def configured(app: Any, **given: Any) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=BoundedHttp,
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        ws="none",
        **given,
    )


class Drains(Protocol):
    draining: bool


class Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def drained(server: Server, app: Drains, delay: float, sockets: list[socket.socket]) -> None:
    """Serve until SIGTERM or SIGINT. Then readiness says 503 for `delay` seconds, so that balancers send nothing more; then no
    connection is taken any more, and running requests have uvicorn's `timeout_graceful_shutdown`. A second signal ends
    at once."""
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

    leaving = asyncio.create_task(leave())
    try:
        await server.serve(sockets)
    finally:
        leaving.cancel()
