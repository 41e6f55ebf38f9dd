"""uvicorn without its own idea of signals: it would close the socket at once and end with 143."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import uvicorn

log = logging.getLogger("dstune.serve")


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
