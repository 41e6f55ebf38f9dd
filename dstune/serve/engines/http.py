"""The way to an engine: HTTP/1.1 over connections that are kept open, answers as raw bytes.

aiohttp costs a quarter of httpx's CPU time per request here (benchmarks/serving.py), which is most of what the gateway added.
"""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from typing import Any

import aiohttp
from yarl import URL

KEPT_SECONDS = 3.0
"""How long an idle connection may be used again. Engines close theirs after 5 s; a request that meets that would fail."""

TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=5.0)
"""Between two chunks there is none: a first token may take minutes, and a client that goes ends the request."""

FAILURES = (aiohttp.ClientError, OSError)
"""What is raised where an engine cannot be reached, or ends within an answer."""


class Upstream:
    """The server of one engine. To be made within an event loop."""

    def __init__(self, url: str, socket: str | None = None, headers: Mapping[str, str] | None = None):
        """url: without a path's last `/`. socket: a Unix socket that it listens on."""
        own: dict[str, Any] = {"limit": 0, "keepalive_timeout": KEPT_SECONDS}
        if socket is None and url.startswith("https:"):
            own["ssl"] = ssl.create_default_context()  # aiohttp's own reads SSL_CERT_FILE once, when it is imported
        connector = aiohttp.UnixConnector(socket, **own) if socket else aiohttp.TCPConnector(**own)
        # Bytes are passed on as they come, so none may be compressed.
        given = {"accept-encoding": "identity", **(headers or {})}
        self._session = aiohttp.ClientSession(
            connector=connector,
            headers=given,
            timeout=TIMEOUT,
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            skip_auto_headers=("user-agent",),
        )
        self._url = url.rstrip("/")
        self._urls: dict[str, URL] = {}

    @property
    def closed(self) -> bool:
        return self._session.closed

    async def send(self, method: str, path: str, body: bytes | None = None) -> aiohttp.ClientResponse:
        """The answer as soon as its head is there; to be closed. Redirects are answers. Raises one of FAILURES."""
        if self.closed:  # a request that met an engine being replaced; aiohttp raises a RuntimeError
            raise ConnectionError("the way to the engine is closed")
        if path not in self._urls:
            self._urls[path] = URL(self._url + path, encoded=True)
        headers = None if body is None else {"content-type": "application/json"}
        return await self._session.request(method, self._urls[path], data=body, headers=headers, allow_redirects=False)

    async def ask(self, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        """Status and content. Raises one of FAILURES."""
        answer = await self.send(method, path, body)
        async with answer:
            return answer.status, await answer.read()

    async def close(self) -> None:
        await self._session.close()
