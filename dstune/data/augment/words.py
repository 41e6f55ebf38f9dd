"""Change words of a text: delete some, swap some, or replace some by synonyms (Wei and Zou 2019, arXiv:1901.11196).

White space and punctuation at the ends of words stay in place.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from random import Random

from dstune.data.swaps import cased, read_pairs

KEY = "data.augment.synonyms"

_CORE = re.compile(r"^(\W*)(.*?)(\W*)$", re.DOTALL)


def pieces(text: str) -> list[str]:
    """Return words alternating with the white space between them, words first and last: `"a b"` gives `["a", " ", "b"]`."""
    return re.split(r"(\s+)", text)


def _words(parts: Sequence[str]) -> list[int]:
    return [place for place in range(0, len(parts), 2) if parts[place]]


def deleted(text: str, chance: float, choose: Random) -> tuple[str, int]:
    """Delete each word with the probability `chance`, but not all words. Returns the text and the number of deleted words."""
    parts = pieces(text)
    places = _words(parts)
    deleted_places = {place for place in places if choose.random() < chance}
    if deleted_places and len(deleted_places) == len(places):
        deleted_places.discard(choose.choice(places))
    remaining = [
        parts[place] + "".join(parts[place + 1 : place + 2])
        for place in range(0, len(parts), 2)
        if place not in deleted_places
    ]
    return "".join(remaining).rstrip() if deleted_places else text, len(deleted_places)


def swapped(text: str, share: float, choose: Random) -> tuple[str, int]:
    """Swap two random words, `share` of the number of words times but at least once. Returns the text and the number of swaps."""
    parts = pieces(text)
    places = _words(parts)
    if len(places) < 2:
        return text, 0
    count = max(1, round(share * len(places)))
    for _ in range(count):
        first, second = choose.sample(places, 2)
        parts[first], parts[second] = parts[second], parts[first]
    return "".join(parts), count


def replaced(text: str, synonyms: Mapping[str, Sequence[str]], share: float, choose: Random) -> tuple[str, int]:
    """Replace `share` of the words, at least one, by synonyms, as far as they have any. Returns the text and the number of
    replaced words."""
    parts = pieces(text)
    places = _words(parts)
    cores = {place: _CORE.fullmatch(parts[place]) for place in places}
    replaceable = [place for place in places if (core := cores[place]) and core.group(2).lower() in synonyms]
    count = min(len(replaceable), max(1, round(share * len(places))))
    for place in choose.sample(replaceable, count):
        core = cores[place]
        assert core is not None
        prefix, word, suffix = core.groups()
        parts[place] = f"{prefix}{cased(choose.choice(synonyms[word.lower()]), word)}{suffix}"
    return "".join(parts), count


def read_synonyms(path: str) -> dict[str, list[str]]:
    """Read synonyms from a file of rows with the columns `word` and `synonym`; a word may have several rows. Raises UserError."""
    synonyms: dict[str, list[str]] = defaultdict(list)
    for word, synonym in read_pairs(path, KEY, {"word": "big", "synonym": "large"}):
        synonyms[word.lower()].append(synonym)
    return dict(synonyms)
