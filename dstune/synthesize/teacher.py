"""A teacher model at an OpenAI-compatible address; failed requests are retried if that may help."""

from __future__ import annotations

import http.client
import json
import random
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from dstune.core.errors import DstuneError, Problem, UserError
from dstune.core.network import LOOPBACK
from dstune.core.parsing import parse_json

RETRIED_STATUSES = (408, 409, 425, 429, 500, 502, 503, 504)
"""Statuses after which the same request may succeed."""
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
"""Seconds; the pause doubles after every attempt."""
MOST_BYTES = 2**26
"""Size limit of an answer."""
FAILURES = (OSError, http.client.HTTPException)


class TeacherUnreachable(DstuneError):
    """The teacher gave no answer in any attempt."""


@dataclass(frozen=True)
class Address:
    """The address of a served model."""

    url: str
    """Including `/v1`."""
    model: str
    key: str = ""
    attempts: int = 6
    seconds: float = 300.0
    """Time limit for one answer."""


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


class Teacher:
    """Sends requests to one address; threads may share it."""

    def __init__(self, address: Address, pause: Callable[[float], None] | None = None):
        """pause: waits for a number of seconds, unless the program is stopped."""
        self.address = address
        self._pause = pause or time.sleep
        self._closing = threading.Event()
        handlers: list[Any] = [_NoRedirect()]
        if urlsplit(address.url).hostname in LOOPBACK:
            handlers.append(urllib.request.ProxyHandler({}))
        else:
            handlers.append(urllib.request.HTTPSHandler(context=ssl.create_default_context()))
        self._opener = urllib.request.build_opener(*handlers)

    def close(self) -> None:
        """Stop retrying."""
        self._closing.set()

    def ask(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Return the JSON object that is answered.

        Raises:
            TeacherUnreachable: no answer came in `attempts`.
            UserError: the request is refused for what it is.
        """
        pause, reason = FIRST_PAUSE, ""
        for attempt in range(self.address.attempts):
            if attempt:
                self._pause(pause * random.uniform(0.5, 1.0))
                pause = min(2 * pause, LONGEST_PAUSE)
            if self._closing.is_set():
                break
            try:
                return self._once(path, body)
            except urllib.error.HTTPError as error:
                with error:
                    detail = _error_detail(error)
                reason = f"HTTP {error.code} {detail}".strip()
                if error.code not in RETRIED_STATUSES:
                    fix = "check --model, --teacher and the variable with the key"
                    raise UserError(Problem("--teacher", reason, fix, self.address.url)) from None
                pause = max(pause, _retry_after(error.headers.get("retry-after")))
            except FAILURES as error:
                reason = str(error) or type(error).__name__
            except ValueError as error:
                reason = f"the answer is no JSON object: {error}"
        tried = f"after {self.address.attempts} attempts" if not self._closing.is_set() else "before the end"
        raise TeacherUnreachable(f"{self.address.url} gave no answer {tried}: {reason}")

    def _once(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        headers = {"content-type": "application/json", "user-agent": "dstune"}
        if self.address.key:
            headers["authorization"] = f"Bearer {self.address.key}"
        data = json.dumps({"model": self.address.model, **body}).encode()
        request = urllib.request.Request(self.address.url + path, data, headers, method="POST")
        with self._opener.open(request, timeout=self.address.seconds) as response:
            content = response.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise ValueError(f"it has more than {MOST_BYTES:,} bytes")
        answer = parse_json(content)
        if not isinstance(answer, dict):
            raise ValueError("it is of another type")
        return answer


def _error_detail(error: urllib.error.HTTPError) -> str:
    """Return the message in the body of an HTTP error, shortened."""
    try:
        content = parse_json(error.read(65_536))
        message = content.get("error", content) if isinstance(content, dict) else content
        text = message.get("message", message) if isinstance(message, dict) else message
    except (ValueError, *FAILURES):
        return ""
    return str(text)[:300]


def _retry_after(value: str | None) -> float:
    try:
        return min(max(float(value or 0), 0.0), LONGEST_PAUSE)
    except ValueError:  # a date
        return 0.0
