"""Links whose host a policy does not list."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from functools import cache
from typing import Any
from urllib.parse import urlsplit

from dstune.core.errors import Problem, UserError

_SCHEME = re.compile(r"\b(?:https?|s?ftp|wss?|file):[/\\]{2}[^\s<>\"'`\])}|\\]{1,2048}", re.IGNORECASE)
_ACTIVE = re.compile(r"\b(?:javascript|vbscript):[^\s]{1,200}|\bdata:text/html[^\s]{1,200}", re.IGNORECASE)
_BARE = re.compile(
    r"(?:[/\\]{2}|(?<![\w@./-]))(?:[^\W_][\w-]{0,62}\.){1,126}[^\W\d_]{2,24}(?::\d{1,5})?(?:/[^\s<>\"'`\])}|\\]{0,2048})?(?![\w@-])"
)


@cache
def _suffixes() -> Any:
    """The suffix list that the package carries; nothing is fetched."""
    try:
        import tldextract
    except ImportError:
        reason = "the package tldextract is not installed"
        raise UserError(Problem("unknown_links", reason, "pip install 'dstune[guard]'")) from None
    return tldextract.TLDExtract(suffix_list_urls=(), cache_dir=None, include_psl_private_domains=True)


def check_installed() -> None:
    """Raises UserError where the suffix list is missing."""
    _suffixes()


def unknown_links(text: str, allowed: Collection[str]) -> Iterator[tuple[int, int]]:
    """Where links stand whose host is none of `allowed` or below one.

    Addresses without a name (`http://0x7f.1/`), and links that run code, are never known.
    """
    seen: list[tuple[int, int]] = []
    for found in _ACTIVE.finditer(text):
        seen.append(found.span())
        yield found.span()
    for found in _SCHEME.finditer(text):
        link = found.group().rstrip(".,;:!?")
        seen.append(found.span())
        if not _known(_host(link), allowed):
            yield found.start(), found.start() + len(link)
    if "." not in text:
        return
    seen.sort(reverse=True)
    end = 0
    for found in _BARE.finditer(text):
        link = found.group().rstrip(".,;:!?")
        while seen and seen[-1][0] <= found.start():
            end = max(end, seen.pop()[1])
        if found.start() < end:
            continue
        name = link.lstrip("/\\")  # `//host` has the scheme of the page that shows it
        host = _host(f"https://{name}")
        parts = _suffixes()(host)
        if not parts.suffix or not parts.domain or ("/" not in link and not link.lower().startswith("www.")):
            continue  # `file.py` and `e.g` are no links, and neither is a name without a path: it is no click away
        if not _known(host, allowed):
            yield found.start(), found.start() + len(link)


def _host(link: str) -> str:
    """Lower case, in ASCII; empty where there is none."""
    try:
        host = (urlsplit(link.replace("\\", "/")).hostname or "").rstrip(".")
        return host.encode("idna").decode() if not host.isascii() else host
    except (ValueError, UnicodeError):
        return ""


def _known(host: str, allowed: Collection[str]) -> bool:
    return any(host == one or host.endswith(f".{one}") for one in allowed)
