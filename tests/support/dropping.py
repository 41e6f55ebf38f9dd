"""A proxy that passes requests on and drops answers, so that the client repeats what was done."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Dropping:
    """A proxy between client and server that passes requests on and drops the first answers to each."""

    def __init__(self, url: str, drops: int):
        self._target = url.removeprefix("http://").split(":")
        self._drops, self.left = drops, 0
        self.dropped = 0

    async def __aenter__(self) -> str:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def __aexit__(self, *exception: object) -> None:
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            length = next(
                (
                    int(line.split(b":")[1])
                    for line in head.lower().split(b"\r\n")
                    if line.startswith(b"content-length")
                ),
                0,
            )
            body = await reader.readexactly(length)
            behind, ahead = await asyncio.open_connection(self._target[0], int(self._target[1]))
            ahead.write(head.replace(b"Connection: keep-alive", b"Connection: close") + body)
            if head.startswith(b"POST") and self.left == 0 and b"retry-count: 0" in head:
                self.left = self._drops
            if head.startswith(b"POST") and self.left:
                await behind.read(1)  # the server has done its work
                self.left, self.dropped = self.left - 1, self.dropped + 1
            else:
                while chunk := await behind.read(65536):
                    writer.write(chunk)
            ahead.close()
        finally:
            writer.close()


@contextmanager
def dropping(url: str, drops: int) -> Iterator[tuple[str, Dropping]]:
    """Yield the proxy and its address, in a thread, for clients in other processes. url: of a server, with `/v1`."""
    loop, proxy = asyncio.new_event_loop(), Dropping(url.removesuffix("/v1"), drops)
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield asyncio.run_coroutine_threadsafe(proxy.__aenter__(), loop).result(10) + "/v1", proxy
    finally:
        asyncio.run_coroutine_threadsafe(proxy.__aexit__(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
