"""A client of an OpenAI-compatible server; requests that failed are repeated if that may help."""

from __future__ import annotations

import http.client
import json
import random
import re
import ssl
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlencode, urlsplit

from dstune.core.errors import DstuneError, Problem, UserError
from dstune.core.network import LOOPBACK
from dstune.core.parsing import parse_json

RETRIED_STATUSES = (408, 409, 425, 429, 500, 502, 503, 504)
"""Statuses after which the same request may succeed."""
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
"""Seconds; the pause doubles after every attempt."""
LONGEST_WAIT = 300.0
"""Seconds that a server may ask for with Retry-After; more is shortened to this."""
BLOCK = 1 << 20
FAILURES = (OSError, http.client.HTTPException)

Result = TypeVar("Result")


class ServerUnreachable(DstuneError):
    """The server gave no answer in any attempt."""


class RequestRefused(UserError):
    """The server refuses a request for what it is."""

    def __init__(self, problem: Problem, status: int, detail: str, parameter: str):
        """status: of HTTP. detail: the server's message. parameter: what it refuses in the body, empty if unnamed."""
        super().__init__(problem)
        self.status, self.detail, self.parameter = status, detail, parameter


@dataclass(frozen=True)
class Address:
    """The address of a server, and how it is asked."""

    url: str
    """The common beginning of its paths, usually up to `/v1`."""
    key: str = field(default="", repr=False)
    key_header: str = "authorization"
    """Any other header than this one carries the key without `Bearer`."""
    query: Mapping[str, str] = field(default_factory=dict)
    """Parameters of every request."""
    attempts: int = 6
    seconds: float = 300.0
    """Time limit for the server's next bytes."""
    most_bytes: int = 2**26
    """Size limit of an answer that is held in memory."""
    flag: str = "--server"
    """The flag that named it, for messages."""
    fix: str = "check the address, and the variable with the key"
    """What to do if it refuses a request."""


def check_address(flag: str, url: str) -> str:
    """Return the address without a trailing `/`. Raises UserError if it is invalid, or would send keys and prompts unencrypted."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query or parts.fragment:
        raise UserError(Problem(flag, "is no address of a server", "https://HOST[:PORT]/v1", url))
    if parts.scheme == "http" and parts.hostname not in LOOPBACK:
        reason = "keys and prompts would go in the clear"
        fix = "https://..., or a tunnel: ssh -L 8000:localhost:8000 HOST and http://localhost:8000/v1"
        raise UserError(Problem(flag, reason, fix, url))
    return url.rstrip("/")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: the key must not go to another address."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


class ApiClient:
    """Sends requests to one address; threads may share it."""

    def __init__(self, address: Address, pause: Callable[[float], object] | None = None):
        """pause: waits for a number of seconds, unless the program is stopped."""
        self.address = address
        self._closing = threading.Event()
        self._pause = pause or self._closing.wait
        self._not_before = 0.0
        """No thread sends a request before this monotonic time: a limit of the rate holds for all of them."""
        handlers: list[Any] = [_NoRedirect()]
        if urlsplit(address.url).hostname in LOOPBACK:
            handlers.append(urllib.request.ProxyHandler({}))
        else:
            handlers.append(urllib.request.HTTPSHandler(context=ssl.create_default_context()))
        self._opener = urllib.request.build_opener(*handlers)

    def close(self) -> None:
        """Stop retrying."""
        self._closing.set()

    def post(self, path: str, body: Mapping[str, Any], *, once: bool = False) -> dict[str, Any]:
        """Return the JSON object that answers `body`. Raises like `get`.

        once: the request creates something. All attempts have one `Idempotency-Key`, so that a server that knows this header
        creates it once even if its answer was lost.
        """
        headers = {"content-type": "application/json"} | ({"idempotency-key": uuid.uuid4().hex} if once else {})
        return self._repeat(lambda: self._object(self._request(path, {}, json.dumps(body).encode(), headers)))

    def ask_once(self, path: str, body: Mapping[str, Any] | None = None, seconds: float | None = None) -> bytes:
        """Post `body`, or get `path` without one, and return the content of the answer. Nothing is repeated.

        seconds: time limit for the server's next bytes, in place of the address's. Raises urllib.error.HTTPError (`detail_of` reads
        its reason); OSError or http.client.HTTPException if no answer comes; ValueError if the answer is too long.
        """
        headers, data = {"content-type": "application/json"}, None if body is None else json.dumps(body).encode()
        return self._content(self._request(path, {}, data, headers), seconds)

    def upload(self, path: str, fields: Mapping[str, str], file: Path, name: str) -> dict[str, Any]:
        """Post a form with `fields` and the content of `file`, whose name in it is `name`; return the JSON object that answers it.
        The file is read in blocks. Attempts are repeated as in `post(once=True)`. Raises like `get`."""
        boundary = uuid.uuid4().hex
        safe_name = re.sub(r'[\x00-\x1f\x7f"\\\\]', "_", name).encode("utf-8", "replace").decode()
        parts = [
            f'--{boundary}\r\ncontent-disposition: form-data; name="{key}"\r\n\r\n{fields[key]}\r\n' for key in fields
        ]
        parts.append(
            f'--{boundary}\r\ncontent-disposition: form-data; name="file"; filename="{safe_name}"\r\n'
            "content-type: application/octet-stream\r\n\r\n"
        )
        beginning, end = "".join(parts).encode(), f"\r\n--{boundary}--\r\n".encode()
        size = len(beginning) + file.stat().st_size + len(end)
        headers = {
            "content-type": f"multipart/form-data; boundary={boundary}",
            "content-length": str(size),
            "idempotency-key": uuid.uuid4().hex,
        }

        def blocks() -> Iterator[bytes]:
            yield beginning
            with file.open("rb") as stream:
                while block := stream.read(BLOCK):
                    yield block
            yield end

        return self._repeat(lambda: self._object(self._request(path, {}, blocks(), headers)))

    def get(self, path: str, query: Mapping[str, str] | None = None) -> dict[str, Any]:
        """Return the JSON object at `path`.

        Raises:
            ServerUnreachable: no answer came in `attempts`.
            RequestRefused: the request is refused for what it is.
        """
        return self._repeat(lambda: self._object(self._request(path, query or {})))

    def download(self, path: str, start: int, write: Callable[[int, bytes], None]) -> int:
        """Pass the bytes at `path` to `write` in blocks, each with its position, and return how many bytes there are.

        start: the number of bytes that an earlier download wrote. Where the connection is cut, the download goes on at this
        position; a server that takes no ranges begins anew, which `write` learns from the position 0. Raises like `get`.
        """
        position = start

        def once() -> int:
            nonlocal position
            request = self._request(path, {})
            if position:
                request.add_header("range", f"bytes={position}-")
            try:
                response = self._opener.open(request, timeout=self.address.seconds)
            except urllib.error.HTTPError as error:
                if error.code != 416:
                    raise
                error.close()
                position = 0
                raise ConnectionError("the server has fewer bytes than were downloaded") from None
            with response:
                if response.status != 206:
                    position = 0
                    write(0, b"")
                elif not _begins_at(response.headers.get("content-range"), position):
                    position = 0
                    raise ConnectionError("the server sent another range")
                length = response.headers.get("content-length")
                end = position + int(length) if length and length.isdigit() else None
                while block := response.read(BLOCK):
                    write(position, block)
                    position += len(block)
                if end is not None and position < end:
                    raise ConnectionError(f"the connection was cut after {position:,} of {end:,} bytes")
            return position

        return self._repeat(once)

    def _repeat(self, once: Callable[[], Result]) -> Result:
        pause, reason = FIRST_PAUSE, ""
        for attempt in range(self.address.attempts):
            if attempt:
                self._pause(pause * random.uniform(0.5, 1.0))
                pause = min(2 * pause, LONGEST_PAUSE)
            if not self._closing.is_set() and (wait := self._not_before - time.monotonic()) > 0:
                self._pause(wait)
            if self._closing.is_set():
                break
            try:
                return once()
            except urllib.error.HTTPError as error:
                with error:
                    detail, parameter = self.detail_of(error)
                reason = f"HTTP {error.code} {detail}".strip()
                if error.code not in RETRIED_STATUSES:
                    problem = Problem(self.address.flag, reason, self.address.fix, self.address.url)
                    raise RequestRefused(problem, error.code, detail, parameter) from None
                if wait := _retry_after(error.headers.get("retry-after")):
                    self._not_before = max(self._not_before, time.monotonic() + wait)
            except FAILURES as error:
                reason = str(error) or type(error).__name__
            except ValueError as error:
                reason = f"the answer is no JSON object: {error}"
        tried = f"after {self.address.attempts} attempts" if not self._closing.is_set() else "before the end"
        raise ServerUnreachable(f"{self.address.url} gave no answer {tried}: {reason}")

    def _request(
        self,
        path: str,
        query: Mapping[str, str],
        data: bytes | Iterator[bytes] | None = None,
        further: Mapping[str, str] | None = None,
    ) -> urllib.request.Request:
        headers = {"user-agent": "dstune", **(further or {})}
        if self.address.key:
            prefix = "Bearer " if self.address.key_header == "authorization" else ""
            headers[self.address.key_header] = prefix + self.address.key
        parameters = urlencode({**query, **self.address.query})
        url = self.address.url + path + (f"?{parameters}" if parameters else "")
        return urllib.request.Request(url, data, headers, method="GET" if data is None else "POST")

    def _content(self, request: urllib.request.Request, seconds: float | None = None) -> bytes:
        most_bytes = self.address.most_bytes
        with self._opener.open(request, timeout=seconds or self.address.seconds) as response:
            content: bytes = response.read(most_bytes + 1)
        if len(content) > most_bytes:
            raise ValueError(f"it has more than {most_bytes:,} bytes")
        return content

    def _object(self, request: urllib.request.Request) -> dict[str, Any]:
        answer = parse_json(self._content(request))
        if not isinstance(answer, dict):
            raise ValueError("it is of another type")
        return answer

    def detail_of(self, error: urllib.error.HTTPError) -> tuple[str, str]:
        """Return the message in the body of an HTTP error, shortened and without the key, and the parameter that it names."""
        try:
            content = parse_json(error.read(65_536))
        except (ValueError, *FAILURES):
            return "", ""
        message = content.get("error", content) if isinstance(content, dict) else content
        text, parameter = (
            (message.get("message", message), message.get("param")) if isinstance(message, dict) else (message, "")
        )
        detail = str(text)
        if self.address.key:
            detail = detail.replace(self.address.key, "<KEY>")
        return detail[:300], str(parameter or "")


def _begins_at(content_range: str | None, position: int) -> bool:
    return (content_range or "").startswith(f"bytes {position}-")


def _retry_after(value: str | None) -> float:
    try:
        return min(max(float(value or 0), 0.0), LONGEST_WAIT)
    except ValueError:  # a date
        return 0.0
