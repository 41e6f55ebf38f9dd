"""Normalises a text to what a reader sees: invisible characters removed, look-alike letters replaced, escapes decoded."""

from __future__ import annotations

import json
import re
import unicodedata
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

MOST_MARKS = 30
"""The limit of Unicode's stream-safe text format; no language comes near it."""

DROPPED = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f"
    "\ufeff\uffa0\U000e0000\U000e0001\U000e007f\U000e0100-\U000e01ef\x00-\x08\x0b\x0c\x0e-\x1f\x7f]"
)
"""Invisible characters: zero width, direction, variation selectors, soft hyphens, fillers, controls."""

_SOURCES = (
    "\u0430\u0435\u043e\u0440\u0441\u0443\u0445\u0456\u0458\u0455\u04bb\u0501\u051b\u051d"  # Cyrillic
    "\u0432\u043a\u043c\u043d\u0442\u04cf"
    "\u0410\u0412\u0415\u041a\u041c\u041d\u041e\u0420\u0421\u0422\u0423\u0425\u0406\u0408\u0405\u0500\u051a\u051c\u04ae\u04c0"
    "\u03b1\u03bf\u03c1\u03bd\u03b9\u03ba\u03c5\u03c7\u03b5\u03c4\u03c9\u03b3"  # Greek
    "\u0391\u0392\u0395\u0396\u0397\u0399\u039a\u039c\u039d\u039f\u03a1\u03a4\u03a5\u03a7"
    "\u0131\u0251\u0261\u0269\u026a\u1d00\u0299\u1d04\u1d05\u1d07\ua730\u0262\u029c\u1d0a"
    "\u1d0b\u029f\u1d0d\u0274\u1d0f\u1d18\u0280\ua731\u1d1b\u1d1c\u1d20\u1d21\u028f\u1d22"
    "\u0570\u0578\u0585\u057d\u0563\u0566\u0581\u054d\u0555\u053c"  # Armenian
    "\u13aa\u13f4\u13df\u13a0\u13ac\u13c0\u13bb\u13ab\u13e6\u13de\u13b7\u13e2\u13a1\u13da\u13a2\u13d9\u13b3\u13a9\u13c3"  # Cherokee
)
_TARGETS = (
    "aeopcyxijshdqwbkmhtlABEKMHOPCTYXIJSGQWYIaopvikuxetwyABEZHIKMNOPTYXiagiiabcdefghjklmnoprstuvwyz"
    "hnouqqgUOLABCDEGHJKLMPRSTVWYZ"
)  # fmt: skip
LOOK_ALIKES = dict(zip(_SOURCES, _TARGETS, strict=True))
"""Cyrillic, Greek, Armenian, Cherokee and small-capital letters that look like Latin ones."""
_FOREIGN = re.compile(f"[{''.join(LOOK_ALIKES)}]")
_WORD = re.compile(r"[^\W\d_]+")
TO_LATIN = str.maketrans(LOOK_ALIKES)


@dataclass(frozen=True)
class Normal:
    """A normalised text with the original places of its characters."""

    text: str
    _starts: Sequence[int] | None = None
    """Start in `text` of each changed piece; None if no characters moved."""
    _origins: Sequence[tuple[int, int]] = ()
    """The place of each piece in the original."""

    def span(self, start: int, end: int) -> tuple[int, int]:
        """Return the span of the original that became `text[start:end]`."""
        if self._starts is None:
            return start, end
        return self._origin(start)[0], self._origin(max(end - 1, start))[1]

    def _origin(self, place: int) -> tuple[int, int]:
        """Return the original place of one character."""
        assert self._starts is not None
        number = bisect_right(self._starts, place) - 1
        first, last = self._origins[number]
        begin = self._starts[number]
        following = self._starts[number + 1] if number + 1 < len(self._starts) else len(self.text)
        if last - first == following - begin:  # unchanged
            return first + place - begin, first + place - begin + 1
        return first, last


def normalised(text: str) -> Normal:
    """Return `text` as a reader sees it: invisible characters removed, tag characters as the letters they represent, compatibility
    forms resolved (NFKC), combining marks removed from Latin letters unless they form another letter, and look-alikes replaced by
    Latin letters in words without other letters. JSON strings are unescaped: `\\nIgnore` is not one word."""
    escapes = "\\" in text and _JSON_STRING.search(text) is not None
    if not escapes and text.isascii() and not DROPPED.search(text):
        return Normal(text)
    parts: list[str] = []
    starts: list[int] = []
    origins: list[tuple[int, int]] = []
    length = 0
    for start, end, piece in _pieces(text, escapes=escapes):
        if not piece:
            continue
        parts.append(piece)
        starts.append(length)
        origins.append((start, end))
        length += len(piece)
    joined = "".join(parts)
    return Normal(_latin(joined), starts, origins)


_JSON_STRING = re.compile(r'"\s*[:,\]}]')
"""The end of a string in JSON."""
_JSON_ESCAPE = re.compile(r"(?<!\\)(?:\\++u[dD][89abAB][0-9a-fA-F]{2})?\\++(?:u[0-9a-fA-F]{4}|[\"/bfnrt])")
"""Nested JSON has more backslashes. Only the first of a run starts a match, without backtracking: 16,000 of them took 2 s."""
_BACKSLASHES = re.compile(r"\\+")


def _pieces(text: str, *, escapes: bool) -> Iterator[tuple[int, int, str]]:
    """Yield the pieces of the text after unescaping, with their places."""
    place = 0
    for match in _JSON_ESCAPE.finditer(text) if escapes else ():
        yield from _normalised_pieces(text, place, match.start())
        read: str = json.loads('"' + _BACKSLASHES.sub(r"\\", match.group()) + '"')
        yield *match.span(), _composed(read.encode("utf-8", "replace").decode())
        place = match.end()
    yield from _normalised_pieces(text, place, len(text))


def _normalised_pieces(text: str, start: int, end: int) -> Iterator[tuple[int, int, str]]:
    for line in _LINE.finditer(text, start, end):
        if _is_unchanged(line.group()):
            yield *line.span(), line.group()
            continue
        for first, last in _clusters(line.group()):
            yield line.start() + first, line.start() + last, _composed(line.group()[first:last])


_LINE = re.compile(r"[^\n]*\n|[^\n]+")
_STANDING = re.compile("[\U000e0020-\U000e007e\U0001f150-\U0001f169\U0001f170-\U0001f189\U0001f1e6-\U0001f1ff]")


def _is_unchanged(line: str) -> bool:
    """Return whether normalisation leaves the line unchanged; checking this character by character takes twenty times as long."""
    if DROPPED.search(line):
        return False
    if line.isascii():
        return True
    changed = not unicodedata.is_normalized("NFKC", line) or _STANDING.search(line)
    return not (changed or any(map(unicodedata.combining, line)))


_STANDS_FOR = {0xE0000 + code: code for code in range(0x20, 0x7F)}
_STANDS_FOR |= {start + code: 65 + code for start in (0x1F150, 0x1F170, 0x1F1E6) for code in range(26)}
"""Tag characters, and letters in circles, squares and flags, which have no compatibility form."""


def _composed(cluster: str) -> str:
    piece = unicodedata.normalize("NFKC", DROPPED.sub("", cluster).translate(_STANDS_FOR))
    bare = piece[:1].isascii() or unicodedata.combining(
        piece[0]
    )  # a lone mark is left over from a cluster with too many marks
    return "".join(character for character in piece if not unicodedata.combining(character)) if bare else piece


def _clusters(text: str) -> Iterator[tuple[int, int]]:
    """Yield each character with its combining marks, at most MOST_MARKS: sorting marks takes quadratic time."""
    start = 0
    for place in range(1, len(text) + 1):
        if place == len(text) or place - start > MOST_MARKS or not unicodedata.combining(text[place]):
            yield start, place
            start = place


def _latin(text: str) -> str:
    """Replace look-alikes by Latin letters; the length stays the same."""
    if not _FOREIGN.search(text):
        return text
    # If the text has other letters of these scripts, a word made of look-alikes only is a word of that language.
    foreign = any(
        "\u0370" <= character <= "\u058f" and character not in LOOK_ALIKES
        for character in set(text)
        if character.isalpha()
    )

    def change(match: re.Match[str]) -> str:
        word = match.group()
        latin = word.translate(TO_LATIN)
        mixed = any(not "\u0370" <= character <= "\u058f" for character in word)  # letters of more than one script
        return latin if latin.isascii() and (mixed or not foreign) else word

    return _WORD.sub(change, text)
