"""Labelled texts, and tools for splitting them: order by hash, groups, runs of words."""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

ATTACK, BENIGN = "attack", "benign"
RUN_WORDS = 8
"""Words per run: texts that share many runs are near copies."""
WINDOW_CHARACTERS = 340
"""About 80 tokens of English, so that code and other languages also fit into a window of 128 tokens."""


@dataclass(frozen=True)
class Text:
    text: str
    label: str
    package: str
    family: str
    """The kind of attack (direct, jailbreak, extraction, indirect, obfuscated) or of benign text (natural, hard, tool,
    document)."""
    group: str
    """A unit that is never split between training and test: a rule, a task, a frame, a thread, a trigger word."""
    direction: str = "input"
    language: str = "en"

    def row(self, suite: str = "") -> dict[str, Any]:
        return {**asdict(self), **({"suite": suite} if suite else {})}

    def truncated(self, characters: int = WINDOW_CHARACTERS) -> Text:
        """Return the text truncated at the last space before character `characters`."""
        return replace(self, text=shorten(self.text, characters))


def shorten(text: str, characters: int) -> str:
    if len(text) <= characters:
        return text
    return text[:characters].rsplit(None, 1)[0]


def hash_fraction(name: str) -> float:
    """Return a number in [0, 1) that depends only on `name`."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") / 2**48


def pick(texts: Iterable[Text], count: int) -> list[Text]:
    """Return at most `count` texts: always the same ones, in pseudorandom order."""
    return sorted(texts, key=lambda text: hash_fraction(text.text))[:count]


def spread(texts: Iterable[Text], each: int, count: int) -> list[Text]:
    """Choose at most `each` texts of a group, and at most `count` in all."""
    groups: dict[str, list[Text]] = {}
    for text in texts:
        groups.setdefault(text.group, []).append(text)
    return pick((text for group in groups.values() for text in pick(group, each)), count)


def distinct(texts: Iterable[Text], letters: int | None = None) -> Iterator[Text]:
    """Yield texts, skipping repetitions of a text, or of its first `letters`, ignoring case and white space."""
    seen: set[str] = set()
    for text in texts:
        key = " ".join(text.text.lower().split())[:letters]
        if key and key not in seen:
            seen.add(key)
            yield text


_WORD = re.compile(r"\w+")


def runs(text: str) -> set[int]:
    """Return hashes of the runs of RUN_WORDS words in `text`; of the complete text if it is shorter."""
    words = _WORD.findall(text.lower())
    last = max(len(words) - RUN_WORDS, 0)
    return {hash(tuple(words[start : start + RUN_WORDS])) for start in range(last + 1)}


_UNREAD = re.compile(r"[A-Za-z0-9+/=_-]{40,}")
_PRONOUNCED = re.compile("[a-z]{4,}")


def has_encoded_run(text: str) -> bool:
    """Return whether the text contains a long run of letters, digits and signs that is neither words nor a path: base64, a key."""
    for match in _UNREAD.finditer(text):
        run = match.group()
        words = sum(map(len, _PRONOUNCED.findall(run)))
        if words < 0.4 * len(run) and re.search(r"\d", run) and re.search("[a-z]", run) and re.search("[A-Z]", run):
            return True
    return False


class Odds:
    """Naive Bayes over words and pairs of words: how much more likely they are in attacks than in harmless texts."""

    RUN = 24
    """Length of the scored part, in words and pairs: one sentence is enough to look like an attack."""

    def __init__(self, attacks: Iterable[Text], harmless: Iterable[Text]):
        self._attacks, self._harmless = (
            Counter(w for text in side for w in self._words(text.text)) for side in (attacks, harmless)
        )
        self._base = math.log((sum(self._attacks.values()) + 1) / (sum(self._harmless.values()) + 1))

    @staticmethod
    def _words(text: str) -> list[str]:
        words = _WORD.findall(text.lower())
        return [part for first, second in pairwise([*words, ""]) for part in (first, f"{first} {second}")]

    def highest(self, text: Text) -> float:
        """Return the highest log-odds of any part of RUN words and pairs."""
        odds = [math.log((self._attacks[w] + 1) / (self._harmless[w] + 1)) - self._base for w in self._words(text.text)]
        sums = list(accumulate(odds, initial=0.0))
        return max(
            sums[min(start + self.RUN, len(odds))] - sums[start] for start in range(max(len(odds) - self.RUN, 0) + 1)
        )


_SCRIPTS = (
    ("ja", "\u3040-\u30ff"),
    ("zh", "\u4e00-\u9fff"),
    ("ko", "\uac00-\ud7af"),
    ("ru", "\u0400-\u04ff"),
    ("ar", "\u0600-\u06ff"),
    ("hi", "\u0900-\u097f"),
    ("th", "\u0e00-\u0e7f"),
    ("he", "\u0590-\u05ff"),
    ("el", "\u0370-\u03ff"),
)
_COMMON = {
    "en": "the of and to is in that you for with your this are be all not what have from",
    "de": "der die das und ist nicht ein eine du sie wie mit auf den von zu ich alle",
    "fr": "le la les des et est une vous que pour dans pas tes votre sur du un je toutes",
    "es": "el la los las y es una que para en tus del por con todas un no su cómo",
    "it": "il lo la gli e è una che per non tuo del con tutte di un come sono i",
    "pt": "o os as e é uma que para não do da com todas em um você seu como",
    "nl": "de het een en is niet van je dat op te alle voor met in ik zijn",
}
_COMMON_WORDS = {name: frozenset(words.split()) for name, words in _COMMON.items()}


def language_of(text: str) -> str:
    """Guess the language by its script, otherwise by common words; `en` if neither decides."""
    for name, characters in _SCRIPTS:
        if len(re.findall(f"[{characters}]", text)) > 0.15 * len(text):
            return name
    words = _WORD.findall(text.lower())
    counts = {name: sum(word in common for word in words) for name, common in _COMMON_WORDS.items()}
    best = max(counts, key=lambda name: (counts[name], name == "en"))
    return best if counts[best] > counts["en"] + 1 else "en"
