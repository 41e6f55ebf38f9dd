"""Makes untrusted text (rows, templates, files of a run, host names) safe for a terminal or a log."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any, TextIO

COLOURS = re.compile(r"\x1b\[(?:[0-2]|3[1-6]|9[1-6])?m")
"""Colours that dstune prints. Without 8 (concealed), 30 and 40 to 47, which can hide text."""
_OBEYED = re.compile(
    # Control characters except line feed and tab, bidirectional overrides and isolates, zero-width characters, lone surrogates.
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]"
)


def visible(text: str, keep: str = "") -> str:
    """Return `text` without characters that a terminal would obey: an escape becomes the four characters `\\x1b`.

    Line feeds, tabs and the characters in `keep` stay.

    >>> visible("a\\x1b[2Jb")
    'a\\\\x1b[2Jb'
    """

    def written(match: re.Match[str]) -> str:
        character = match[0]
        return character if character in keep else character.encode("unicode_escape").decode()

    return _OBEYED.sub(written, text)


def one_line(text: str) -> str:
    """Return `text` as `visible` does, and on one line."""
    return visible(text).replace("\n", "\\n").replace("\t", "\\t")


def visible_but_colours(text: str) -> str:
    """Return `text` as `visible` does, but keep the colours of dstune, and carriage returns, which redraw a progress line."""
    pieces, position = [], 0
    for colour in COLOURS.finditer(text):
        pieces += [visible(text[position : colour.start()], keep="\r"), colour[0]]
        position = colour.end()
    return "".join([*pieces, visible(text[position:], keep="\r")])


class Filtered(io.TextIOBase):
    """A text stream that passes each write through `change` to another stream."""

    def __init__(self, stream: TextIO, change: Callable[[str], str]):
        self._stream, self._change = stream, change

    def write(self, text: str) -> int:
        self._stream.write(self._change(text))
        return len(text)

    def flush(self) -> None:
        self._stream.flush()

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding

    @property
    def buffer(self) -> Any:
        return self._stream.buffer
