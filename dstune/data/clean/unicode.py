"""Remove characters that nobody meant to write: control characters and stray invisible ones; unify spellings of a letter (NFC).

An invisible character stays if its script needs it: joiners between letters of Arabic or Indic scripts and inside
emoji, direction marks in text that has right-to-left letters, zero-width spaces between words of Thai or Khmer.
"""

from __future__ import annotations

import re
import unicodedata

_REMOVED = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f"  # controls except tab, line feed, carriage return and next line
    "\ufeff\ufdd0-\ufdef\ufffe\uffff]"  # byte order mark inside a text; code points that are no characters
)
_LINE_ENDS = re.compile("\r\n?|\x85")
_ASCII_SUSPECTS = re.compile("[\x00-\x08\x0b-\x1f\x7f]")

ZERO_WIDTH_SPACE, NON_JOINER, JOINER, WORD_JOINER = "\u200b", "\u200c", "\u200d", "\u2060"
_INVISIBLE = re.compile("[\u200b-\u200d\u2060]")
_DIRECTIONS = re.compile("[\u200e\u200f\u061c\u202a-\u202e\u2066-\u2069]")
_TAGS = re.compile("(\U0001f3f4[\U000e0020-\U000e007e]+\U000e007f)|[\U000e0000-\U000e007f]+")
"""Invisible copies of ASCII characters: part of the flags of regions, otherwise a way to hide text."""

_SEPARATED_BY_SPACES = re.compile(
    "[A-Za-z0-9\u00a0-\u036f\u0370-\u058f\u10a0-\u10ff\u1e00-\u1fff\u2000-\u206f\\s]"  # Latin, Greek, Cyrillic, ...
)
_SOUTH_EAST_ASIAN = re.compile("[\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff\u1980-\u19df\u1a20-\u1aaf]")


def clean_unicode(text: str) -> str:
    """Return `text` in NFC with LF line ends and without control and stray invisible characters; clean text is unchanged."""
    if text.isascii():
        if not _ASCII_SUSPECTS.search(text):
            return text
        return _REMOVED.sub("", _LINE_ENDS.sub("\n", text))
    while (cleaned := _pass(text)) != text:
        text = cleaned  # removing a character may bring together others that must now be removed
    return text


def _pass(text: str) -> str:
    text = _REMOVED.sub("", _LINE_ENDS.sub("\n", text))
    text = _TAGS.sub(lambda match: match.group(1) or "", text)
    if _DIRECTIONS.search(text) and not _has_right_to_left(text):
        text = _DIRECTIONS.sub("", text)
    text = _INVISIBLE.sub(lambda match: match.group() if _is_needed(text, match.start()) else "", text)
    return unicodedata.normalize("NFC", text)  # returns `text` itself, after a quick check, if it is NFC already


def _has_right_to_left(text: str) -> bool:
    return any(unicodedata.bidirectional(character) in ("R", "AL", "AN") for character in set(text))


def _is_needed(text: str, position: int) -> bool:
    """Return whether the surrounding script needs the invisible character at `position`."""
    character_before = text[position - 1] if position else ""
    character_after = text[position + 1] if position + 1 < len(text) else ""
    if not character_before or not character_after:
        return False
    character = text[position]
    if character == ZERO_WIDTH_SPACE:  # in scripts without spaces between words it marks where a line may break
        return bool(_SOUTH_EAST_ASIAN.match(character_before) or _SOUTH_EAST_ASIAN.match(character_after))
    if character == WORD_JOINER:
        return False
    # A joiner acts on the character before it: a letter of a joining script, or a part of an emoji.
    return not _SEPARATED_BY_SPACES.match(character_before) and not _INVISIBLE.match(character_before)
