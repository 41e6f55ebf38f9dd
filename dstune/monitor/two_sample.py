"""Permutation tests of several signals at once: whether live and reference conversations come from one distribution.

Every signal gives a statistic of the membership of rows, larger where the two sides differ more. All signals of a family see the
same permutations, so the smallest of their p-values has a distribution that is known exactly, however they depend on each
other (Westfall and Young, Resampling-Based Multiple Testing, 1993, algorithm 2.5). No statistic needs a formula for its
distribution, and the level holds for any number of rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

CHUNK = 256
"""Permutations that are computed together: memory holds [rows, CHUNK] numbers."""
FREQUENCIES = 512
"""Random frequencies that approximate the kernel."""
EXACT_KERNEL_ROWS = 1500
"""Up to this many rows of both sides together, MMD uses the exact kernel; with more rows, random features cost less."""
BANDWIDTH_ROWS = 1000
MOST_CATEGORIES = 20
TIE = 1e-5
"""Two statistics count as equal below this relative difference, since matrix products round by their shape."""


class Statistic(Protocol):
    """How much two sides differ in one signal."""

    def __call__(self, live: np.ndarray) -> np.ndarray:
        """Return the statistic of each membership, [columns]. live: float32 [rows, columns], 1 for rows of the live side."""


@dataclass(frozen=True)
class JointTest:
    """The results of permutation tests for a family of signals."""

    p: dict[str, float]
    """The p-value of each signal by itself."""
    adjusted: dict[str, float]
    """P-values corrected for all signals of the family."""
    statistics: dict[str, np.ndarray]
    """float64 [1 + permutations], the observed one first."""
    smallest: np.ndarray
    """The smallest p-value of each permutation, [1 + permutations]."""

    def threshold(self, level: float) -> float:
        """Return the largest p-value of a single signal at which the family's level is kept; 0 if there is none."""
        candidates = np.sort(self.smallest)
        count = int(np.floor(level * len(candidates)))
        while count > 0 and np.sum(candidates <= candidates[count - 1]) > level * len(candidates):
            count -= 1
        return float(candidates[count - 1]) if count else 0.0


def test_jointly(signals: Mapping[str, Statistic], is_live: np.ndarray, permutations: int, seed: int) -> JointTest:
    """Test all signals with the same permutations of the memberships. is_live: bool [rows]."""
    generator = np.random.default_rng(seed)
    total = permutations + 1
    statistics = {name: np.empty(total) for name in signals}
    observed = is_live.astype(np.float32)
    for start in range(0, total, CHUNK):
        columns = min(CHUNK, total - start)
        rows = generator.permuted(np.tile(observed, (columns, 1)), axis=1)
        if start == 0:
            rows[0] = observed
        live = np.ascontiguousarray(rows.T)
        for name, statistic in signals.items():
            statistics[name][start : start + columns] = statistic(live)
    p_values = {name: upper_tail(values) for name, values in statistics.items()}
    smallest = np.min(np.stack([*p_values.values()]), axis=0)
    first = {name: float(values[0]) for name, values in p_values.items()}
    adjusted = {name: float(np.mean(smallest <= value * (1 + TIE))) for name, value in first.items()}
    return JointTest(first, adjusted, statistics, smallest)


def upper_tail(statistics: np.ndarray) -> np.ndarray:
    """Return, for each value, the share of all values that are at least as large, [values]."""
    ordered = np.sort(statistics)
    below = np.searchsorted(ordered, statistics - TIE * np.abs(statistics), side="left")
    return np.asarray((len(ordered) - below) / len(ordered))


class MeanDiscrepancy:
    """Squared maximum mean discrepancy with a Gaussian kernel (Gretton and others, JMLR 13, 2012); the bandwidth is the median
    distance.

    This is the biased estimate. For fixed numbers of rows it differs from the unbiased one by a constant, so the test is the same.
    """

    def __init__(self, vectors: np.ndarray, seed: int = 0):
        """vectors: float32 [rows, dimensions]."""
        self._kernel: np.ndarray | None = None
        self.features = gaussian_features(vectors, seed)
        if len(vectors) <= EXACT_KERNEL_ROWS:
            self._kernel = np.exp(-_squared_distances(vectors) / (2 * median_distance(vectors, seed) ** 2))

    def __call__(self, live: np.ndarray) -> np.ndarray:
        weights = _mean_difference(live)
        if self._kernel is not None:
            return np.asarray(np.einsum("rc,rc->c", weights, self._kernel @ weights, dtype=np.float64))
        return np.asarray(np.sum((self.features.T @ weights).astype(np.float64) ** 2, axis=0))


def _mean_difference(live: np.ndarray) -> np.ndarray:
    """Return weights [rows, columns] with which the sum over rows is the live mean minus the reference mean."""
    count = live.sum(axis=0, dtype=np.float64)
    return np.asarray((live / count - (1 - live) / (len(live) - count)).astype(np.float32))


def _squared_distances(vectors: np.ndarray) -> np.ndarray:
    norms = np.einsum("rd,rd->r", vectors, vectors)
    return np.maximum(norms[:, None] + norms[None, :] - 2 * vectors @ vectors.T, 0)


def median_distance(vectors: np.ndarray, seed: int) -> float:
    """Return the median distance of pairs among at most BANDWIDTH_ROWS rows of both sides; 1 if all are equal."""
    rows = vectors
    if len(vectors) > BANDWIDTH_ROWS:
        rows = vectors[np.random.default_rng(seed).choice(len(vectors), BANDWIDTH_ROWS, replace=False)]
    distances = _squared_distances(rows)[np.triu_indices(len(rows), 1)]
    return float(np.sqrt(np.median(distances))) or 1.0


def gaussian_features(vectors: np.ndarray, seed: int) -> np.ndarray:
    """Return float32 [rows, 2 FREQUENCIES] whose products approach the kernel (Rahimi and Recht, NIPS 2007)."""
    generator = np.random.default_rng(seed)
    scale = 1 / median_distance(vectors, seed)
    frequencies = generator.normal(scale=scale, size=(vectors.shape[1], FREQUENCIES)).astype(np.float32)
    angles = vectors @ frequencies
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=1) / np.float32(np.sqrt(FREQUENCIES))


class DomainClassifier:
    """The statistic of a ridge classifier that tells live from reference rows which it has not seen: the difference of mean scores.

    Each row is left out once. For least squares, the score of a left-out row follows from one fit of all rows: it is
    y - (y - Hy) / (1 - h), where H is the projection and h its diagonal. So a permutation costs two products.
    """

    def __init__(self, vectors: np.ndarray):
        """vectors: float32 [rows, dimensions]."""
        centred = (vectors - vectors.mean(axis=0)).astype(np.float64)
        values, axes = np.linalg.eigh(centred.T @ centred)
        values = np.maximum(values, 0)
        penalty = max(float(values.mean()), 1e-12)
        self._basis = (centred @ (axes / np.sqrt(values + penalty))).astype(np.float32)
        self._leverage = np.einsum("rd,rd->r", self._basis, self._basis) + 1 / len(vectors)

    def scores(self, live: np.ndarray) -> np.ndarray:
        """Return the score of each row by a fit without it, [rows, columns]; larger means more like a live row."""
        fitted = self._basis @ (self._basis.T @ live) + live.mean(axis=0)
        return np.asarray(live - (live - fitted) / (1 - self._leverage[:, None]))

    def __call__(self, live: np.ndarray) -> np.ndarray:
        return np.asarray(np.einsum("rc,rc->c", _mean_difference(live), self.scores(live), dtype=np.float64))


class LargestGap:
    """The Kolmogorov-Smirnov statistic of one number per row. Ties are handled exactly, since it is compared with its own
    permutations."""

    def __init__(self, values: np.ndarray):
        """values: float [rows]."""
        self._order = np.argsort(values, kind="stable")
        ordered = values[self._order]
        self._ends = np.append(ordered[1:] != ordered[:-1], True)

    def __call__(self, live: np.ndarray) -> np.ndarray:
        gaps = np.cumsum(_mean_difference(live)[self._order], axis=0, dtype=np.float64)[self._ends]
        return np.asarray(np.abs(gaps).max(axis=0))


class CategoryShares:
    """The chi-squared statistic of one category per row; rare ones are merged."""

    def __init__(self, categories: np.ndarray):
        """categories: str [rows]."""
        names, numbers, counts = np.unique(categories, return_inverse=True, return_counts=True)
        rank = np.empty(len(names), dtype=np.int64)
        rank[np.argsort(-counts, kind="stable")] = np.arange(len(names))
        numbers = np.minimum(rank[numbers], MOST_CATEGORIES)
        self._is_category = (numbers[:, None] == np.arange(numbers.max() + 1)).astype(np.float32)
        self._share = self._is_category.mean(axis=0, dtype=np.float64)[:, None]

    def __call__(self, live: np.ndarray) -> np.ndarray:
        expected = self._share * live.sum(axis=0, dtype=np.float64)
        return np.asarray((((self._is_category.T @ live) - expected) ** 2 / expected).sum(axis=0))
