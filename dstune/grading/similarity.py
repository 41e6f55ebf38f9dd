"""How alike two texts are, from 0 to 1.

ROUGE (Lin 2004) counts the lower-cased ASCII words that the package rouge-score counts; BLEU (Papineni et al. 2002) and GLEU
(Wu et al. 2016) the words between spaces, as NLTK's sentence measures.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence

MOST_CHARACTERS = 20_000
"""Of a text: what is compared grows with the product of both lengths."""
FUZZY_CHARACTERS = 5_000
"""For `fuzzy_match`, which tries all places of the shorter text in the longer one: 0.1 s at most, and 9 s at 20,000."""

_WORD = re.compile(r"[a-z0-9]+")


def fuzzy_match(text: str, reference: str) -> float:
    from rapidfuzz.fuzz import WRatio

    return WRatio(text, reference) / 100


def bleu(text: str, reference: str) -> float:
    """Compute BLEU of up to four words at a time, as many as the shorter text has; a precision of 0 counts as 0.1 matches."""
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
    """Return the smaller one of precision and recall over one to four words at a time."""
    words, expected = text.split(), reference.split()
    matched = sum(_overlap(words, expected, size) for size in range(1, 5))
    total = max(
        sum(max(len(words_of_text) - size + 1, 0) for size in range(1, 5)) for words_of_text in (words, expected)
    )
    return matched / total if total else 0.0


def rouge(size: int) -> Callable[[str, str], float]:
    """Return the function that computes the F1 of so many words at a time."""

    def measure(text: str, reference: str) -> float:
        words, expected = _words(text), _words(reference)
        matched = _overlap(words, expected, size)
        return _f1(matched, len(words) - size + 1, len(expected) - size + 1)

    return measure


def rouge_l(text: str, reference: str) -> float:
    """Compute the F1 of the longest common subsequence."""
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
    "cosine": "it compares vectors of a model, and graders need none here",
    "meteor": "it needs a dictionary of synonyms, which the server has not",
}


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _overlap(words: Sequence[str], expected: Sequence[str], size: int) -> int:
    """Return how many runs of `size` words the two have in common."""

    def runs(words: Sequence[str]) -> Counter[tuple[str, ...]]:
        return Counter(tuple(words[at : at + size]) for at in range(len(words) - size + 1))

    return (runs(words) & runs(expected)).total()


def _f1(matched: int, answered: int, expected: int) -> float:
    if matched == 0:
        return 0.0
    precision, recall = matched / answered, matched / expected
    return 2 * precision * recall / (precision + recall)


def _common_subsequence(words: Sequence[str], expected: Sequence[str]) -> int:
    """Return the length of the longest common subsequence, with a bit for each word (Hyyrö 2004): a row of the usual table is
    one number."""
    places: dict[str, int] = {}
    for at, word in enumerate(words):
        places[word] = places.get(word, 0) | 1 << at
    row = full = (1 << len(words)) - 1
    for word in expected:
        matched = row & places.get(word, 0)
        row = ((row + matched) | (row - matched)) & full
    return len(words) - row.bit_count()
