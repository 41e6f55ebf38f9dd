"""Links whose host a policy does not list."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any
from urllib.parse import unquote

from dstune.core.errors import Problem, UserError

LONGEST_NAME = 253
"""Of a host, in the domain name system."""
_START = re.compile(
    r"(?<![A-Za-z0-9])(?P<scheme>https?\\?:[/\\]*|(?:s?ftp|wss?|file)\\?:[/\\]{2,})|(?<![\w:/\\])[/\\]{2,}|(?<![\w@./-])(?=www\.)",
    re.IGNORECASE,
)
r"""What stands before a host. Browsers take any number of slashes after `https:`, in both directions, and Markdown takes the
backslash of `https\:` away."""
_NAME = re.compile(
    r"(?:\*\.)?[^\s/?#\\:@!\"$&'()*+,;<=>\[\]^`{|}~\u00ab\u00bb\u2010-\u2027\u2030-\u205e\u3001\u3008-\u3011\u3014-\u301f]{0,800}"
)
"""Each sign of a name may be written in three."""
_PORT = re.compile(r"(?::\d{0,5})?")
_STOP = re.compile(r"[\s/?#]|\\(?![!-/:-@\[-`{-~])")
r"""Where user and host end by the URL standard. Markdown reads `\@` as `@`: there the backslash is no slash."""
_DOT = re.compile(r"[.\u3002\uff0e\uff61%]\w")
"""With what a host goes on, and so ends in another domain; a dot may be `%2e`."""
_NO_HOST = re.compile(r"[<>\[\]^|]")
"""Browsers load no URL that has one of these in its host."""
_PATH = re.compile(r"[^\s<>\"'`\])}|\\]{0,2048}")
_NUMBER = re.compile(r"(?:.*\.)?(?:0x[0-9a-f]*|\d+)\.?|\[[0-9a-f:.]*\]", re.IGNORECASE)
_PORT_ALONE = re.compile(r"\d{1,5}")
"""`http:80` names a port; as an address it would be nobody's."""
_CLOSING = {"(": ")", "<": ">", "[": "]", "{": "}", '"': '"', "'": "'", "`": "`"}
_ACTIVE = re.compile(r"\b(?:javascript|vbscript):[^\s]{1,200}|\bdata:text/html[^\s]{1,200}", re.IGNORECASE)
_BARE = re.compile(
    r"(?:[/\\]{2}|(?<![\w@./-]))(?:[^\W_][\w-]{0,62}\.){1,126}[^\W\d_]{2,24}(?::\d{1,5})?(?:/[^\s<>\"'`\])}|\\]{0,2048})?(?![\w@-])"
)


@cache
def _domain_extractor() -> Any:
    """Return what splits a host into parts by the suffix list in the package tldextract; nothing is fetched. Raises UserError."""
    try:
        import tldextract
    except ImportError:
        reason = "the package tldextract is not installed"
        raise UserError(Problem("unknown_links", reason, "pip install '.[guard]' in a clone of dstune")) from None
    return tldextract.TLDExtract(suffix_list_urls=(), cache_dir=None, include_psl_private_domains=True)


def check_installed() -> None:
    """Raises UserError where the suffix list is missing."""
    _domain_extractor()


def unknown_links(text: str, allowed: Collection[str]) -> Iterator[tuple[int, int]]:
    """Yield where links stand whose host is none of `allowed` or below one.

    Never known are addresses without a name (`http://0x7f.1/`), links that run code, and those with a user before the host
    (`https://example.com@evil.com`) or with a sign after which it goes on (`https://example.com'.evil.com`).
    """
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
            continue  # `file.py` and `e.g` are no links, and neither is a name without a path: it is no click away
        if not _is_allowed(host, allowed):
            yield match.start(), match.start() + len(link)


@dataclass(frozen=True)
class _Link:
    """An address with a scheme, two slashes or `www.`."""

    start: int
    end: int
    host: str
    """Lower case, in ASCII; empty where it is not what the address begins with."""


class _Search:
    """For the links of one text."""

    def __init__(self, text: str):
        self._text = text
        self._stop, self._dot, self._no_host = (_Next(pattern, text) for pattern in (_STOP, _DOT, _NO_HOST))
        self._last_at = (-1, -1)
        """Where a host ends, and the last @ before."""

    def links(self) -> Iterator[_Link]:
        place = 0
        while (match := _START.search(self._text, place)) is not None:
            place = max(match.end(), match.start() + 1)
            link = self._link(match)
            if link is not None:
                yield link
                place = max(link.end, place)

    def _link(self, match: re.Match[str]) -> _Link | None:
        """Read the link of a match; None where no host may be meant: `https://` alone, `http:80`, `// a comment`."""
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
        """Return what a browser may take for the host, by what stands between the name, which ends at `name_end`, and the next
        slash."""
        if self._at_before(stop, begin) >= name_end:
            return [_matched(_NAME, self._text, self._at_before(stop, begin) + 1) or "@"]
        in_brackets = self._text.startswith("[", begin)
        if in_brackets or self._dot(name_end) < min(stop, self._no_host(name_end)):
            tail = self._text[max(begin, stop - LONGEST_NAME) : stop]
            return [tail.rstrip(")>}\"'`,;!?")]
        return []

    def _at_before(self, stop: int, begin: int) -> int:
        """Return the last @ between the two places, or a place before."""
        if self._last_at[0] != stop:  # several beginnings may have one end
            self._last_at = stop, self._text.rfind("@", begin, stop)
        return self._last_at[1]

    def _closed(self, start: int, name_end: int) -> bool:
        """Return whether what follows the name closes the bracket or quote that the link stands in, and the next is no part of
        it."""
        text = self._text
        name_end += text.startswith("\\", name_end)  # of JSON within JSON
        closing = _CLOSING.get(text[max(start - 1, 0) : start])
        if closing is None or not text.startswith(closing, name_end):
            return False
        in_markdown = text.startswith("](", max(start - 2, 0))
        return in_markdown or not re.match(r"[\w@.%-]", text[name_end + 1 : name_end + 2])


class _Next:
    """Finds where a pattern matches next. Asked for places that only rise it reads the text once."""

    def __init__(self, pattern: re.Pattern[str], text: str):
        self._pattern, self._text, self._found = pattern, text, -1

    def __call__(self, place: int) -> int:
        """Return where the first match at or behind `place` begins; the length of the text where there is none."""
        if self._found < place:
            match = self._pattern.search(self._text, place)
            self._found = match.start() if match else len(self._text)
        return self._found


def _matched(pattern: re.Pattern[str], text: str, place: int) -> str:
    match = pattern.match(text, place)
    assert match is not None, "these match nothing too"
    return match.group()


def _is_address(name: str, after: str) -> bool:
    """Return whether the text names a host of the internet; a number does only with a path after it, since it may be any."""
    name = unquote(name)
    if after in ("/", "?", "#", "\\") and _NUMBER.fullmatch(name) and not _PORT_ALONE.fullmatch(name):
        return True
    return _has_domain(name)


def _has_domain(host: str) -> bool:
    parts = _domain_extractor()(host)
    return bool(parts.suffix and parts.domain)


def _host(name: str) -> str:
    """Lower case, in ASCII; empty where it cannot be one."""
    name = name.rstrip("._\u3002").lower()  # `_` ends emphasis, and no domain
    if len(name) > LONGEST_NAME:
        return ""
    try:
        return name if name.isascii() else name.encode("idna").decode()
    except UnicodeError:
        return ""


def _is_allowed(host: str, allowed: Collection[str]) -> bool:
    return any(host == allowed_host or host.endswith(f".{allowed_host}") for allowed_host in allowed)
