"""Find texts that repeat held-out ones: equal, nearly equal, or with a long run of words in common.

Two texts are nearly equal if their edit distance, relative to the longer text, is small (`near.similarity`, as in `data.clean`) and
they have the same numbers and signs: "x + 1 = 0" and "x - 1 = 0" are different questions. Words that many held-out rows have in
common are a template; texts are compared without them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from dstune.data.clean.extras import require
from dstune.data.clean.near import SIGNATURE_NUMBERS, NearCopies, signature
from dstune.data.clean.words import Words, words_in

SIMILARITY = 0.8
"""Least similarity of nearly equal texts: one word in about eight may differ."""
SHORT_WORDS = 8
SHORT_SIMILARITY = 0.9
"""The same for texts of fewer than eight words, in which another word often makes another question."""
COMMON = 10
"""A run of words in more held-out rows than this belongs to a template (more than 2 if there are fewer than 30 rows)."""
TEMPLATE_WORDS = 4
"""Shortest template that nearly equal texts are compared without."""
SEARCHED_PAIRWISE = 96
"""Characters. MinHash misses near copies of short texts, so held-out texts up to this length are compared with every text."""
PAIRS_AT_ONCE = 1 << 22

Near = tuple[str, int, bool]
"""A text without its template, the hash of its numbers and signs, and whether it is short."""


class HeldOutTexts:
    """Texts that no training row may repeat.

    rows: the texts of each held-out row. run_words: length of a run of words that no other text may share. key: the setting or
    option that asks for this, for the message about a missing package. Raises UserError if a package is missing.
    """

    def __init__(self, rows: Iterable[Sequence[str]], run_words: int, key: str):
        near_packages(key)
        self._run_words = run_words
        distinct = {tuple(words.text for words in row): row for row in (_read(texts) for texts in rows)}
        texts = {words.text: words for row in distinct.values() for words in row}
        most = max(2, min(COMMON, len(distinct) // 10))
        counts, template = Counter[int](), Counter[int]()
        for row in distinct.values():
            counts.update({run for words in row for *_, run in words.runs(run_words)})
            template.update({run for words in row for *_, run in words.runs(TEMPLATE_WORDS)})
        self._runs = {run for run, count in counts.items() if count <= most}
        self._template = {run for run, count in template.items() if count > most}
        self._texts = set(texts)
        near = list(dict.fromkeys(map(self._near, texts.values())))
        self._short = [entry for entry in near if len(entry[0]) <= SEARCHED_PAIRWISE]
        self._long = [entry for entry in near if len(entry[0]) > SEARCHED_PAIRWISE]
        self._signatures = b"".join(signature(text) for text, *_ in self._long)

    def repeated_in(self, texts: Sequence[str], *, are_answers: bool = False) -> np.ndarray:
        """Return which of `texts` repeat a held-out text: bool [texts].

        are_answers: then short texts never do, because many questions have the answer "yes".
        """
        read = [words_in(text) for text in texts]
        repeats = np.zeros(len(read), dtype=bool)
        searched = []
        for place, words in enumerate(read):
            if not words.tokens or (are_answers and words.count < SHORT_WORDS):
                continue
            repeats[place] = words.text in self._texts or any(
                run in self._runs for *_, run in words.runs(self._run_words)
            )
            if not repeats[place]:
                searched.append(place)
        near = [self._near(read[place]) for place in searched]
        for found in (self._pairwise(near), self._by_signature(near)):
            repeats[[searched[place] for place in found]] = True
        return repeats

    def _near(self, words: Words) -> Near:
        runs = [(start, end) for start, end, run in words.runs(TEMPLATE_WORDS) if run in self._template]
        rest = words.without(runs) if runs else words
        rest = rest if rest.tokens else words  # the template alone
        return rest.text, hash(rest.figures), rest.count < SHORT_WORDS

    def _pairwise(self, near: Sequence[Near]) -> set[int]:
        """Return the places in `near` of those nearly equal to a short held-out text."""
        if not near or not self._short:
            return set()
        search, distance = require("rapidfuzz.process", ""), require("rapidfuzz.distance", "").Levenshtein
        repeats: set[int] = set()
        held_out = [text for text, *_ in self._short]
        step = max(1, PAIRS_AT_ONCE // len(held_out))
        for start in range(0, len(near), step):
            some = near[start : start + step]
            similarities = search.cdist(
                [text for text, *_ in some], held_out, scorer=distance.normalized_similarity, score_cutoff=SIMILARITY
            )
            for place, other in np.argwhere(similarities > 0):
                if _allowed(some[place], self._short[other], float(similarities[place, other])):
                    repeats.add(start + int(place))
        return repeats

    def _by_signature(self, near: Sequence[Near]) -> list[int]:
        """Return the places in `near` of those nearly equal to a long held-out text."""
        places = [place for place, (text, *_) in enumerate(near) if len(text) > SIMILARITY * SEARCHED_PAIRWISE]
        if not places or not self._long:
            return []
        entries = [*self._long, *(near[place] for place in places)]
        signatures = self._signatures + b"".join(signature(near[place][0]) for place in places)
        matrix = np.frombuffer(signatures, dtype=np.uint32).reshape(-1, SIGNATURE_NUMBERS)
        figures = np.array([entry[1] for entry in entries])

        def allowed(first: np.ndarray, second: np.ndarray) -> np.ndarray:
            is_pair = (first < len(self._long)) & (second >= len(self._long))
            return is_pair & (figures[first] == figures[second])

        original = NearCopies(matrix, lambda row: entries[row][0], allowed, SIMILARITY).find()[len(self._long) :]
        return [place for place, copied in zip(places, original.tolist(), strict=True) if copied >= 0]


def near_packages(key: str) -> None:
    """Raises UserError, with the setting `key`, if a package is missing that near matches need."""
    for module in ("rensa", "rapidfuzz"):
        require(module, key)


def _read(texts: Sequence[str]) -> list[Words]:
    return [words for words in map(words_in, texts) if words.tokens]


def _allowed(text: Near, held_out: Near, similarity: float) -> bool:
    least = SHORT_SIMILARITY if text[2] or held_out[2] else SIMILARITY
    return text[1] == held_out[1] and similarity >= least
