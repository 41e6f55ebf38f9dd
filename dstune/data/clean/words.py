"""Read a text as words of any script, without punctuation, but with the numbers and signs that tell two questions apart.

Scripts that put no spaces between words are read character by character, and lengths in words count such a character as a part of
a word: half of one in Chinese and Japanese, a quarter in Thai, Lao, Khmer, Burmese and Tibetan.
"""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property

QUARTERS = {"word": 4, "number": 4, "sign": 0, "half": 2, "quarter": 1}
"""Length of each kind of token, in quarters of a word."""

HALF = r"\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
QUARTER = r"\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff"
SIGNS = r"-/*+=<>^%\u00b1\u00d7\u00f7\u221a\u2260\u2264\u2265$\u20ac\u00a3\u00a5"
DASHES = str.maketrans(dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2212", "-") | {"\u2044": "/"})
THOUSANDS = re.compile(r",(?=\d{3}(?:\D|$))")


@dataclass(frozen=True)
class Words:
    """The words, numbers and signs of a text, in lower case."""

    tokens: tuple[str, ...]
    kinds: tuple[str, ...]
    """The kind of each token, a key of `QUARTERS`."""

    @cached_property
    def count(self) -> float:
        """The length in words."""
        return sum(QUARTERS[kind] for kind in self.kinds) / 4

    @cached_property
    def text(self) -> str:
        """The tokens, separated by spaces except in scripts that have none."""
        parts: list[str] = []
        is_spaced = False
        for token, kind in zip(self.tokens, self.kinds, strict=True):
            has_spaces = kind not in ("half", "quarter")
            if parts and (has_spaces or is_spaced):
                parts.append(" ")
            parts.append(token)
            is_spaced = has_spaces
        return "".join(parts)

    @cached_property
    def figures(self) -> tuple[str, ...]:
        """The numbers and signs, sorted."""
        pairs = zip(self.tokens, self.kinds, strict=True)
        return tuple(sorted(token for token, kind in pairs if kind in ("number", "sign")))

    def runs(self, words: int) -> Iterator[tuple[int, int, int]]:
        """Yield (start, end, hash) of each shortest run of tokens that is at least `words` long."""
        lengths = [QUARTERS[kind] for kind in self.kinds]
        end, length = 0, 0
        for start in range(len(lengths)):
            while length < 4 * words and end < len(lengths):
                length += lengths[end]
                end += 1
            if length < 4 * words:
                return
            yield start, end, hash(self.tokens[start:end])
            length -= lengths[start]

    def without(self, runs: Sequence[tuple[int, int]]) -> Words:
        """Return the words outside `runs` (start, end)."""
        covered = {place for start, end in runs for place in range(start, end)}
        places = [place for place in range(len(self.tokens)) if place not in covered]
        return Words(tuple(self.tokens[place] for place in places), tuple(self.kinds[place] for place in places))


def words_in(text: str) -> Words:
    """Read the words of a text. Width, case and all punctuation that is no sign of arithmetic or of a currency are ignored."""
    text = unicodedata.normalize("NFKC", text).casefold().translate(DASHES)
    tokens, kinds = [], []
    for match in _tokens().finditer(text):
        kind, token = str(match.lastgroup), match[0]
        if kind == "sign" and token in "-/*" and not _calculates(text, match.start()):
            continue
        tokens.append(THOUSANDS.sub("", token) if kind == "number" else token)
        kinds.append(kind)
    return Words(tuple(tokens), tuple(kinds))


@cache
def _tokens() -> re.Pattern[str]:
    # Accents and vowel signs, which `\w` does not match.
    marks = "".join(chr(code) for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code)).startswith("M"))
    return re.compile(
        rf"(?P<number>\d+(?:[.,]\d+)*)|(?P<half>[{HALF}])|(?P<quarter>[{QUARTER}][{marks}]*)"
        rf"|(?P<word>[^\W\d_{HALF}{QUARTER}](?:[^\W\d_{HALF}{QUARTER}]|[{marks}])*)|(?P<sign>[{SIGNS}])"
    )


def _calculates(text: str, place: int) -> bool:
    """Return whether `-`, `/` or `*` at `place` is a sign of arithmetic rather than a hyphen, a dash, a slash or a bullet."""
    before, after = text[max(0, place - 3) : place], text[place + 1 : place + 4]
    left, right = before.rstrip(), after.lstrip()
    is_left = bool(re.search(r"[\d)]$|(?:^|[^\w])[^\W\d_]$", left))
    is_right = bool(re.match(r"[\d(]|[^\W\d_](?:$|\W|\d)", right))
    if is_left and is_right:
        return True
    is_unary = text[place] == "-" and not re.search(r"\w$", before)
    return is_unary and bool(re.match(r"\d", after) or (re.match(r"[\d(]", right) and re.search(r"[=(<>+*/,]$", left)))
