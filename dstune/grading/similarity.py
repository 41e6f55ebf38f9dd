"""Measures of the similarity of two texts, from 0 to 1.

ROUGE (Lin 2004) counts lower-cased ASCII words, as the package rouge-score does. BLEU (Papineni et al. 2002) and GLEU
(Wu et al. 2016) count words between spaces, as NLTK's sentence-level measures do.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence

MOST_CHARACTERS = 20_000
"""Longest text that is compared: the time grows with the product of both lengths."""
FUZZY_CHARACTERS = 5_000
"""The same for `fuzzy_match`, which tries the shorter text at every position of the longer one: 0.1 s at most, but 9 s with 20,000
characters."""

_WORD = re.compile(r"[a-z0-9]+")


def fuzzy_match(text: str, reference: str) -> float:
    """Return RapidFuzz's weighted ratio (WRatio), which is based on edit distances."""
    from rapidfuzz.fuzz import WRatio

    return WRatio(text, reference) / 100


def bleu(text: str, reference: str) -> float:
    """Return BLEU over n-grams of one to four words, or up to the length of the shorter text. An order without a match counts as
    0.1 matches; without a common word the result is 0."""
    words, expected = text.split(), reference.split()
    longest = min(4, len(words), len(expected))
    if not longest or not _overlap(words, expected, 1):
        return 0.0
    logarithms = 0.0
    for size in range(1, longest + 1):
        matched = _overlap(words, expected, size) or 0.1
        logarithms += math.log(matched / (len(words) - size + 1)) / longest
    brevity = 1.0 if len(words) > len(expected) else math.exp(1 - len(expected) / len(words))
    return brevity * math.exp(logarithms)


def gleu(text: str, reference: str) -> float:
    """Return the lesser of precision and recall over n-grams of one to four words."""
    words, expected = text.split(), reference.split()
    matched = sum(_overlap(words, expected, size) for size in range(1, 5))
    total = max(
        sum(max(len(words_of_text) - size + 1, 0) for size in range(1, 5)) for words_of_text in (words, expected)
    )
    return matched / total if total else 0.0


def rouge(size: int) -> Callable[[str, str], float]:
    """Return the function that computes ROUGE-N, the F1 of n-grams of `size` words."""

    def measure(text: str, reference: str) -> float:
        words, expected = _words(text), _words(reference)
        matched = _overlap(words, expected, size)
        return _f1(matched, len(words) - size + 1, len(expected) - size + 1)

    return measure


def rouge_l(text: str, reference: str) -> float:
    """Return ROUGE-L, the F1 of the longest common subsequence of words."""
    words, expected = _words(text), _words(reference)
    return _f1(_common_subsequence(words, expected), len(words), len(expected))


METRICS: dict[str, Callable[[str, str], float]] = {
    "fuzzy_match": fuzzy_match,
    "bleu": bleu,
    "gleu": gleu,
    **{f"rouge_{size}": rouge(size) for size in range(1, 6)},
    "rouge_l": rouge_l,
}
REFUSED = {
    "cosine": "it compares embeddings, and graders run without an embedding model here",
    "meteor": "it needs a dictionary of synonyms, which the server does not have",
}
"""Measures of OpenAI's API that are not available, with the reason."""


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _overlap(words: Sequence[str], expected: Sequence[str], size: int) -> int:
    """Return how many n-grams of `size` words the two have in common."""

    def count_ngrams(words: Sequence[str]) -> Counter[tuple[str, ...]]:
        return Counter(tuple(words[at : at + size]) for at in range(len(words) - size + 1))

    return (count_ngrams(words) & count_ngrams(expected)).total()


def _f1(matched: int, count: int, expected_count: int) -> float:
    if matched == 0:
        return 0.0
    precision, recall = matched / count, matched / expected_count
    return 2 * precision * recall / (precision + recall)


def _common_subsequence(words: Sequence[str], expected: Sequence[str]) -> int:
    """Return the length of the longest common subsequence (Hyyrö 2004). A row of the usual table is one integer, with a bit for
    each word."""
    places: dict[str, int] = {}
    for at, word in enumerate(words):
        places[word] = places.get(word, 0) | 1 << at
    row = full = (1 << len(words)) - 1
    for word in expected:
        matched = row & places.get(word, 0)
        row = ((row + matched) | (row - matched)) & full
    return len(words) - row.bit_count()
