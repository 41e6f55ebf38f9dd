"""Find near duplicates: MinHash proposes rows that may be alike, and the edit distance of their texts decides.

A text is the set of its runs of 5 characters. Its signature (MinHash: Broder 1997) is 256 numbers; the share of equal
numbers in two signatures estimates the Jaccard index of the sets. Rows that agree in one of 64 groups of 4 numbers are
compared (locality-sensitive hashing: Indyk and Motwani 1998): a pair of index J is missed with probability
(1 - J^4)^64. Copies with 5% of the characters edited at random have J = 0.63, so all but 2 in 100,000 of them are compared;
with 10%, J = 0.42 and one in 8 is missed.

The groups are sorted one after the other instead of being kept in an index, so this takes 48 bytes of memory a row; the
signatures, 1 KiB a row, are on disk.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np

from dstune.data.clean.extras import require

RUN_CHARACTERS = 5
SIGNATURE_NUMBERS = 256
GROUP_NUMBERS = 4
SEED = 42

COMPARED_IN_GROUP = 64
"""Rows of a group are compared only with its first 64 rows, so that large groups do not take quadratic time."""

PAIRS_AT_ONCE = 4096
"""Signatures of 4,096 pairs take 8 MiB."""

REMEMBERED_FAILURES = 1_000_000

Allowed = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Returns, for pairs of rows (first, second), int64 [pairs] each, whether the second may be a copy of the first: bool [pairs]."""


def signature(text: str) -> bytes:
    """Return the signature of `text`: the bytes of 256 numbers (uint32). Needs the extra `clean`."""
    minhash = require("rensa", "data.clean.duplicates").RMinHash
    hashes = _runs(text)
    offsets = np.array([0, len(hashes)], dtype=np.uint64)
    # One text per call: a batch would start threads, and a process forked afterwards would wait for them forever.
    matrix = minhash.digest_matrix_from_flat_token_hashes(hashes, offsets, SIGNATURE_NUMBERS, SEED)
    return np.array(matrix.to_rows()[0], dtype=np.uint32).tobytes()


def _runs(text: str) -> np.ndarray:
    """Return the hashes of all runs of 5 characters in `text`, uint64 [runs]; a shorter text is one run."""
    characters = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32).astype(np.uint64)
    if len(characters) < RUN_CHARACTERS:
        characters = np.pad(characters, (0, RUN_CHARACTERS - len(characters)))
    count = len(characters) - RUN_CHARACTERS + 1
    hashes = np.zeros(count, dtype=np.uint64)
    for place in range(RUN_CHARACTERS):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + characters[place : place + count]
    return hashes


def open_signatures(file: Path, rows: int) -> np.ndarray:
    """Return the signatures written to `file` one after the other, memory-mapped: uint32 [rows, 256]."""
    if not rows:
        return np.empty((0, SIGNATURE_NUMBERS), dtype=np.uint32)
    return np.memmap(file, dtype=np.uint32, mode="r", shape=(rows, SIGNATURE_NUMBERS))


def similarity(first: str, second: str, threshold: float) -> float:
    """Return 1 - edit distance / length of the longer text (Levenshtein 1966), or 0 if that is below `threshold`."""
    distance = require("rapidfuzz.distance", "data.clean.duplicates").Levenshtein
    return distance.normalized_similarity(first, second, score_cutoff=threshold)


class NearCopies:
    """Finds rows that are near copies of earlier ones.

    signatures: uint32 [rows, 256], in order of precedence. text: returns the text of a row.
    threshold: smallest `similarity` of a copy, 0.8 to 1.
    """

    def __init__(self, signatures: np.ndarray, text: Callable[[int], str], allowed: Allowed, threshold: float):
        self._signatures = signatures
        self._text = lru_cache(maxsize=1024)(text)
        self._allowed = allowed
        self._threshold = threshold
        # The smallest Jaccard index that is possible at the threshold: each edit changes at most five runs.
        lost = RUN_CHARACTERS * (1 - threshold)
        index = max(0.0, (1 - lost) / (1 + lost))
        # Minus four standard deviations of its estimate.
        self._least_equal = index - 4 * np.sqrt(index * (1 - index) / SIGNATURE_NUMBERS)
        self._failed: set[tuple[int, int]] = set()

    def find(self) -> np.ndarray:
        """Return, for each row, the earlier row that it is a copy of, or -1: int64 [rows]. That earlier row is never a copy itself:
        if copies of copies drift away from the first row, those that are too far from it are not counted as copies."""
        original = np.full(len(self._signatures), -1, dtype=np.int64)
        for first in range(0, SIGNATURE_NUMBERS, GROUP_NUMBERS):
            self._search_group(first, original)
        for row in np.flatnonzero(original >= 0):
            first_copy = original[original[row]]
            if first_copy >= 0:
                original[row] = first_copy if self._alike(int(first_copy), int(row)) else -1
        return original

    def _search_group(self, first: int, original: np.ndarray) -> None:
        values = self._group_values(first)
        order = np.argsort(values, kind="stable")  # stable: equal values stay in the order of precedence
        values = values[order]
        starts = np.flatnonzero(np.concatenate([[True], values[1:] != values[:-1]]))
        sizes = np.diff(np.append(starts, len(values)))
        starts, sizes = starts[sizes > 1], sizes[sizes > 1]
        place = 0
        while len(starts) and place < COMPARED_IN_GROUP:
            # Compare the row at `place` of each group with the rows after it in that group.
            behind = sizes - place - 1
            first_rows = np.repeat(order[starts + place], behind)
            within = np.arange(behind.sum()) - np.repeat(np.cumsum(behind) - behind, behind)
            second_rows = order[np.repeat(starts + place + 1, behind) + within]
            self._compare(first_rows, second_rows, original)
            place += 1
            starts, sizes = starts[sizes > place + 1], sizes[sizes > place + 1]

    def _group_values(self, first: int) -> np.ndarray:
        """Return the numbers `first` to `first + 3` of each signature, combined into one number: uint64 [rows]."""
        values = np.zeros(len(self._signatures), dtype=np.uint64)
        for place in range(first, first + GROUP_NUMBERS):
            values = values * np.uint64(0x9E3779B97F4A7C15) + self._signatures[:, place]
        return values

    def _compare(self, first: np.ndarray, second: np.ndarray, original: np.ndarray) -> None:
        """Compare the rows `first[i]` and `second[i]`; for each later row that is a copy, note the earlier one in `original`."""
        for start in range(0, len(first), PAIRS_AT_ONCE):
            earlier_rows, later_rows = first[start : start + PAIRS_AT_ONCE], second[start : start + PAIRS_AT_ONCE]
            possible = (original[later_rows] < 0) & self._allowed(earlier_rows, later_rows)
            earlier_rows, later_rows = earlier_rows[possible], later_rows[possible]
            if not len(earlier_rows):
                continue
            equal = np.mean(self._signatures[earlier_rows] == self._signatures[later_rows], axis=1)
            for earlier, later in zip(
                earlier_rows[equal >= self._least_equal], later_rows[equal >= self._least_equal], strict=True
            ):
                if original[later] < 0 and self._alike(int(earlier), int(later)):
                    original[later] = earlier

    def _alike(self, earlier: int, later: int) -> bool:
        if (earlier, later) in self._failed:
            return False
        if similarity(self._text(earlier), self._text(later), self._threshold) >= self._threshold:
            return True
        if len(self._failed) >= REMEMBERED_FAILURES:
            self._failed.clear()
        self._failed.add((earlier, later))
        return False
