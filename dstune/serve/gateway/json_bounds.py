"""Bounds the size of a JSON text by counting its bytes, before a parser creates an object for each bracket."""

from __future__ import annotations

import re
import sys
from itertools import accumulate

MOST_MEMBERS = 100_000
"""Objects, lists, and members of objects."""
MOST_VALUES = 500_000
"""Values of lists and objects, and texts."""
SLICE = 1 << 18
"""Bytes that are counted at once: other threads get their turn in between."""
_PLAIN = bytes(set(range(256)) - set(b'"[]{},:'))
_STRING = re.compile(rb'"[^"]*"?')
_STEP = {ord(b"["): 1, ord(b"{"): 1, ord(b"]"): -1, ord(b"}"): -1}


def members_in(text: bytes) -> int:
    """Count the objects, lists and members of a JSON text; the count stops once it exceeds MOST_MEMBERS."""
    most = _members(text)
    return most if most <= MOST_MEMBERS // 100 else _count(text, sys.maxsize)[0]


def excess_of(text: bytes, depth: int) -> str:
    """Return which limit a JSON text exceeds, in words; empty if it may be parsed."""
    brackets = text.count(b"[") + text.count(b"{")
    if brackets <= depth and brackets + text.count(b":") <= MOST_MEMBERS and text.count(b",") <= MOST_VALUES:
        return ""  # true of almost every text, whatever its strings contain
    members, values, deepest = _count(text, depth)
    if members > MOST_MEMBERS:
        return f"holds more than {MOST_MEMBERS:,} objects, lists and members"
    if values > MOST_VALUES:
        return f"holds more than {MOST_VALUES:,} values"
    return f"is nested more than {depth} deep" if deepest > depth else ""


def _members(text: bytes) -> int:
    return text.count(b"[") + text.count(b"{") + text.count(b":")


def _count(text: bytes, most_deep: int) -> tuple[int, int, int]:
    """Count members, values and depth; the count stops once one of them exceeds its limit."""
    members = values = level = deepest = start = 0
    within = b""
    while start < len(text) and members <= MOST_MEMBERS and values <= MOST_VALUES and deepest <= most_deep:
        part = text[start : start + SLICE]
        start += len(part)
        if (len(part) - len(part.rstrip(b"\\"))) % 2 and start < len(text):  # keeps an escape with its character
            part += text[start : start + 1]
            start += 1
        marks = within + part.replace(b"\\\\", b"").replace(b'\\"', b"").translate(None, _PLAIN)
        quotes = marks.count(b'"')
        within = b'"' * (quotes % 2)
        values += quotes // 2
        marks = _STRING.sub(b"", marks)
        members += _members(marks)
        values += marks.count(b",")
        levels = [level, *accumulate((_STEP[mark] for mark in marks.translate(None, b",:")), initial=level)]
        deepest, level = max(deepest, *levels), levels[-1]
    return members, values, deepest
