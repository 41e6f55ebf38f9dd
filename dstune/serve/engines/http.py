"""The HTTP/1.1 client for engines: connections stay open, and answers are passed on as raw bytes.

aiohttp needs a quarter of httpx's CPU time per request here (benchmarks/serving.py); with httpx, that time was most of the
gateway's overhead.
"""

from __future__ import annotations

import json
import re
import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import aiohttp
from yarl import URL

from dstune.core.parsing import parse_json

KEEPALIVE_SECONDS = 3.0
"""How long an idle connection may be reused. Engines close theirs after 5 s, and a request sent at that moment would fail."""

TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=5.0)
"""No limit between two chunks: a first token may take minutes, and a client that disconnects cancels the request."""

FAILURES = (aiohttp.ClientError, OSError)
"""Raised when an engine cannot be reached, or stops in the middle of an answer."""
MOST_EVENT_BYTES = 16 << 20
MOST_READ_BYTES = 256 << 20
"""Limit of an answer that is read into memory: log-probabilities of a long prompt take a few MB."""


_HALF = re.compile(rb"\\u[dD][89a-fA-F]|\xed[\xa0-\xbf]")
"""Half of a surrogate pair: alone it is not a character and cannot be passed on."""


def object_of(content: bytes) -> dict[str, Any]:
    """Parse the JSON object that an engine has sent. Raises one of FAILURES if it is not one."""
    try:
        value = parse_json(content)
    except ValueError as error:
        raise aiohttp.ClientPayloadError(f"the engine sent no JSON: {error}") from None
    if _HALF.search(content):
        with of_its_shape():
            json.dumps(value, ensure_ascii=False).encode()
    if not isinstance(value, dict):
        raise aiohttp.ClientPayloadError("the engine sent no JSON object")
    return value


@contextmanager
def of_its_shape() -> Iterator[None]:
    """Convert errors about the shape of an engine's response into one of FAILURES."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise aiohttp.ClientPayloadError(f"the engine sent something of another shape: {error}") from error


def within_event(buffer: bytes) -> bytes:
    """Return `buffer`, the start of a stream's event. Raises one of FAILURES if the event grows without an end."""
    if len(buffer) > MOST_EVENT_BYTES:
        raise aiohttp.ClientPayloadError(f"an event of the engine has more than {MOST_EVENT_BYTES:,} bytes")
    return buffer


class Upstream:
    """A client of one engine's server. Create it within an event loop."""

    def __init__(self, url: str, socket: str | None = None, headers: Mapping[str, str] | None = None):
        """url: without a trailing `/`. socket: the Unix socket that the server listens on."""
        options: dict[str, Any] = {"limit": 0, "keepalive_timeout": KEEPALIVE_SECONDS}
        if socket is None and url.startswith("https:"):
            options["ssl"] = ssl.create_default_context()  # aiohttp's own reads SSL_CERT_FILE once, when it is imported
        connector = aiohttp.UnixConnector(socket, **options) if socket else aiohttp.TCPConnector(**options)
        # Bytes are passed on as they arrive, so they must not be compressed.
        session_headers = {"accept-encoding": "identity", **(headers or {})}
        self._session = aiohttp.ClientSession(
            connector=connector,
            headers=session_headers,
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
        """Send a request and return the response as soon as its head has arrived; the caller closes it. Redirects are not
        followed. Raises one of FAILURES."""
        if self.closed:  # the request met an engine that is being replaced; aiohttp would raise a RuntimeError
            raise ConnectionError("the way to the engine is closed")
        if path not in self._urls:
            self._urls[path] = URL(self._url + path, encoded=True)
        headers = None if body is None else {"content-type": "application/json"}
        return await self._session.request(method, self._urls[path], data=body, headers=headers, allow_redirects=False)

    async def ask(self, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        """Send a request and return the status and the content. Raises one of FAILURES."""
        answer = await self.send(method, path, body)
        async with answer:
            content = await answer.content.read(MOST_READ_BYTES + 1)
            while len(content) <= MOST_READ_BYTES and (block := await answer.content.read(MOST_READ_BYTES)):
                content += block
            if len(content) > MOST_READ_BYTES:
                raise aiohttp.ClientPayloadError(f"the answer has more than {MOST_READ_BYTES:,} bytes")
            return answer.status, content

    async def close(self) -> None:
        await self._session.close()
