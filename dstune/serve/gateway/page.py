"""The chat page: one file that loads nothing from elsewhere. The key stays in the page's memory."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from importlib.resources import files


@cache
def html() -> bytes:
    return (files("dstune.serve.gateway") / "page.html").read_bytes()


def _digest(tag: str) -> str:
    inner = re.search(rf"<{tag}>(.*?)</{tag}>".encode(), html(), re.S)
    assert inner is not None
    return base64.b64encode(hashlib.sha256(inner[1]).digest()).decode()


def _policy() -> str:
    """Return the content security policy: only the page's own script and style run, and it connects to its own server only."""
    return (
        f"default-src 'none'; script-src 'sha256-{_digest('script')}'; style-src 'sha256-{_digest('style')}'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


HEADERS = [(b"content-type", b"text/html; charset=utf-8"), (b"content-security-policy", _policy().encode())]
