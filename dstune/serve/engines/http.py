"""The way to an engine: HTTP/1.1 over connections that are kept open, answers as raw bytes.

aiohttp costs a quarter of httpx's CPU time per request here (benchmarks/serving.py), which is most of what the gateway added.
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

KEPT_SECONDS = 3.0
"""How long an idle connection may be used again. Engines close theirs after 5 s; a request that meets that would fail."""

TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=5.0)
"""Between two chunks there is none: a first token may take minutes, and a client that goes ends the request."""

FAILURES = (aiohttp.ClientError, OSError)
"""What is raised where an engine cannot be reached, or ends within an answer."""
MOST_EVENT_BYTES = 16 << 20
MOST_READ_BYTES = 256 << 20
"""Of an answer that is read as a whole: log-probabilities of a long prompt have some MB."""


_HALF = re.compile(rb"\\u[dD][89a-fA-F]|\xed[\xa0-\xbf]")
"""Of a character: alone it can be passed on to nobody."""


def object_of(content: bytes) -> dict[str, Any]:
    """Return the JSON object that an engine has sent. Raises one of FAILURES where it is none."""
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
    """Raises one of FAILURES where what an engine has sent is not shaped as its API says."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise aiohttp.ClientPayloadError(f"the engine sent something of another shape: {error}") from error


def within_event(buffer: bytes) -> bytes:
    """Return the beginning of an event of a stream. Raises one of FAILURES where it has no end."""
    if len(buffer) > MOST_EVENT_BYTES:
        raise aiohttp.ClientPayloadError(f"an event of the engine has more than {MOST_EVENT_BYTES:,} bytes")
    return buffer


class Upstream:
    """The server of one engine. To be made within an event loop."""

    def __init__(self, url: str, socket: str | None = None, headers: Mapping[str, str] | None = None):
        """url: without a path's last `/`. socket: a Unix socket that it listens on."""
        options: dict[str, Any] = {"limit": 0, "keepalive_timeout": KEPT_SECONDS}
        if socket is None and url.startswith("https:"):
            options["ssl"] = ssl.create_default_context()  # aiohttp's own reads SSL_CERT_FILE once, when it is imported
        connector = aiohttp.UnixConnector(socket, **options) if socket else aiohttp.TCPConnector(**options)
        # Bytes are passed on as they come, so none may be compressed.
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
        """Return the answer as soon as its head is there; to be closed. Redirects are answers. Raises one of FAILURES."""
        if self.closed:  # a request that met an engine being replaced; aiohttp raises a RuntimeError
            raise ConnectionError("the way to the engine is closed")
        if path not in self._urls:
            self._urls[path] = URL(self._url + path, encoded=True)
        headers = None if body is None else {"content-type": "application/json"}
        return await self._session.request(method, self._urls[path], data=body, headers=headers, allow_redirects=False)

    async def ask(self, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        """Ask for the status and the content. Raises one of FAILURES."""
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
