"""Finds links whose host a policy does not allow."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any
from urllib.parse import unquote

from dstune.core.errors import Problem, UserError

LONGEST_NAME = 253
"""Longest host name in the domain name system."""
_START = re.compile(
    r"(?<![A-Za-z0-9])(?P<scheme>https?\\?:[/\\]*|(?:s?ftp|wss?|file)\\?:[/\\]{2,})|(?<![\w:/\\])[/\\]{2,}|(?<![\w@./-])(?=www\.)",
    re.IGNORECASE,
)
r"""What precedes a host. Browsers accept any number of slashes after `https:`, in both directions, and Markdown removes the
backslash of `https\:`."""
_NAME = re.compile(
    r"(?:\*\.)?[^\s/?#\\:@!\"$&'()*+,;<=>\[\]^`{|}~\u00ab\u00bb\u2010-\u2027\u2030-\u205e\u3001\u3008-\u3011\u3014-\u301f]{0,800}"
)
"""Each character of a name may be percent-encoded as three."""
_PORT = re.compile(r"(?::\d{0,5})?")
_STOP = re.compile(r"[\s/?#]|\\(?![!-/:-@\[-`{-~])")
r"""Where user and host end by the URL standard. Markdown reads `\@` as `@`: there the backslash is not a slash."""
_DOT = re.compile(r"[.\u3002\uff0e\uff61%]\w")
"""Continuations that turn a host into another domain; a dot may be written as `%2e`."""
_NO_HOST = re.compile(r"[<>\[\]^|]")
"""Browsers load no URL with one of these in its host."""
_PATH = re.compile(r"[^\s<>\"'`\])}|\\]{0,2048}")
_NUMBER = re.compile(r"(?:.*\.)?(?:0x[0-9a-f]*|\d+)\.?|\[[0-9a-f:.]*\]", re.IGNORECASE)
_PORT_ALONE = re.compile(r"\d{1,5}")
"""`http:80` names a port; as an address it would belong to nobody."""
_CLOSING = {"(": ")", "<": ">", "[": "]", "{": "}", '"': '"', "'": "'", "`": "`"}
_ACTIVE = re.compile(r"\b(?:javascript|vbscript):[^\s]{1,200}|\bdata:text/html[^\s]{1,200}", re.IGNORECASE)
_BARE = re.compile(
    r"(?:[/\\]{2}|(?<![\w@./-]))(?:[^\W_][\w-]{0,62}\.){1,126}[^\W\d_]{2,24}(?::\d{1,5})?(?:/[^\s<>\"'`\])}|\\]{0,2048})?(?![\w@-])"
)


@cache
def _domain_extractor() -> Any:
    """Return a function that splits a host by the suffix list in the package tldextract; nothing is downloaded. Raises
    UserError."""
    try:
        import tldextract
    except ImportError:
        reason = "the package tldextract is not installed"
        raise UserError(Problem("unknown_links", reason, "pip install '.[guard]' in a clone of dstune")) from None
    return tldextract.TLDExtract(suffix_list_urls=(), cache_dir=None, include_psl_private_domains=True)


def check_installed() -> None:
    """Raises UserError if the suffix list is missing."""
    _domain_extractor()


def unknown_links(text: str, allowed: Collection[str]) -> Iterator[tuple[int, int]]:
    """Yield the places of links whose host is neither in `allowed` nor below one. Always reported: numeric addresses
    (`http://0x7f.1/`), links that run code, and links with a user before the host (`https://example.com@evil.com`) or with a
    character after it that continues the host (`https://example.com'.evil.com`)."""
    seen: list[tuple[int, int]] = []
    for active in _ACTIVE.finditer(text):
        seen.append(active.span())
        yield active.span()
    for search_link in _Search(text).links():
        seen.append((search_link.start, search_link.end))
        if not _is_allowed(search_link.host, allowed):
            yield search_link.start, search_link.start + len(text[search_link.start : search_link.end].rstrip(".,;:!?"))
    if "." not in text:
        return
    seen.sort(reverse=True)
    end = 0
    for match in _BARE.finditer(text):
        link = match.group().rstrip(".,;:!?")
        while seen and seen[-1][0] <= match.start():
            end = max(end, seen.pop()[1])
        if match.start() < end:
            continue
        host = _host(re.split("[/:]", link.lstrip("/\\"), maxsplit=1)[0])
        if "/" not in link or not _has_domain(host):
            continue  # `file.py` and `e.g` are not links, nor is a name without a path, which clients do not make clickable
        if not _is_allowed(host, allowed):
            yield match.start(), match.start() + len(link)


@dataclass(frozen=True)
class _Link:
    """An address with a scheme, two slashes or `www.`."""

    start: int
    end: int
    host: str
    """Lower case, in ASCII; empty if the address does not begin with its host."""


class _Search:
    """Searches one text for links."""

    def __init__(self, text: str):
        self._text = text
        self._stop, self._dot, self._no_host = (_Next(pattern, text) for pattern in (_STOP, _DOT, _NO_HOST))
        self._last_at = (-1, -1)
        """Where a host ends, and the last @ before it."""

    def links(self) -> Iterator[_Link]:
        place = 0
        while (match := _START.search(self._text, place)) is not None:
            place = max(match.end(), match.start() + 1)
            link = self._link(match)
            if link is not None:
                yield link
                place = max(link.end, place)

    def _link(self, match: re.Match[str]) -> _Link | None:
        """Return the link of a match; None if no host can be meant: `https://` alone, `http:80`, `// a comment`."""
        text, (start, begin) = self._text, match.span()
        name = _matched(_NAME, text, begin)
        name_end = begin + len(name)
        name_end += len(_matched(_PORT, text, name_end))
        stop = self._stop(begin)
        others = [] if self._closed(start, name_end) else self._other_names(begin, name_end, stop)
        if not name and not others:
            return None
        sure = match["scheme"] is not None and text[begin - 1] in "/\\"
        if not sure and not any(_is_address(host_name, text[stop : stop + 1]) for host_name in (name, *others)):
            return None
        end = begin + len(text[begin:stop].rstrip(")>}\"'`")) if others else name_end
        if end == stop:
            end += len(_matched(_PATH, text, stop))
        return _Link(start, end, "" if others else _host(name))

    def _other_names(self, begin: int, name_end: int, stop: int) -> list[str]:
        """Return other names that a browser may take for the host, given the text between `name_end`, where the name ends, and the
        next slash."""
        if self._at_before(stop, begin) >= name_end:
            return [_matched(_NAME, self._text, self._at_before(stop, begin) + 1) or "@"]
        in_brackets = self._text.startswith("[", begin)
        if in_brackets or self._dot(name_end) < min(stop, self._no_host(name_end)):
            tail = self._text[max(begin, stop - LONGEST_NAME) : stop]
            return [tail.rstrip(")>}\"'`,;!?")]
        return []

    def _at_before(self, stop: int, begin: int) -> int:
        """Return the last @ between `begin` and `stop`, or a place before `begin`."""
        if self._last_at[0] != stop:  # several links may share an end
            self._last_at = stop, self._text.rfind("@", begin, stop)
        return self._last_at[1]

    def _closed(self, start: int, name_end: int) -> bool:
        """Return whether the text after the name closes the bracket or quote around the link, and does not continue the name."""
        text = self._text
        name_end += text.startswith("\\", name_end)  # JSON inside JSON
        closing = _CLOSING.get(text[max(start - 1, 0) : start])
        if closing is None or not text.startswith(closing, name_end):
            return False
        in_markdown = text.startswith("](", max(start - 2, 0))
        return in_markdown or not re.match(r"[\w@.%-]", text[name_end + 1 : name_end + 2])


class _Next:
    """Finds the next match of a pattern. For increasing places it reads the text only once."""

    def __init__(self, pattern: re.Pattern[str], text: str):
        self._pattern, self._text, self._found = pattern, text, -1

    def __call__(self, place: int) -> int:
        """Return the start of the first match at or after `place`; the length of the text if there is none."""
        if self._found < place:
            match = self._pattern.search(self._text, place)
            self._found = match.start() if match else len(self._text)
        return self._found


def _matched(pattern: re.Pattern[str], text: str, place: int) -> str:
    match = pattern.match(text, place)
    assert match is not None, "these match nothing too"
    return match.group()


def _is_address(name: str, after: str) -> bool:
    """Return whether the text names a public host. A number only does with a path after it, since it may be any number."""
    name = unquote(name)
    if after in ("/", "?", "#", "\\") and _NUMBER.fullmatch(name) and not _PORT_ALONE.fullmatch(name):
        return True
    return _has_domain(name)


def _has_domain(host: str) -> bool:
    parts = _domain_extractor()(host)
    return bool(parts.suffix and parts.domain)


def _host(name: str) -> str:
    """Return the host in lower case and ASCII; empty if it cannot be a host."""
    name = name.rstrip("._\u3002").lower()  # `_` ends emphasis in Markdown, and is not part of a domain
    if len(name) > LONGEST_NAME:
        return ""
    try:
        return name if name.isascii() else name.encode("idna").decode()
    except UnicodeError:
        return ""


def _is_allowed(host: str, allowed: Collection[str]) -> bool:
    return any(host == allowed_host or host.endswith(f".{allowed_host}") for allowed_host in allowed)
