"""Power of the embedding test: what the available rows could have detected, and the rows needed for 80%."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dstune.monitor.two_sample import MeanDiscrepancy

TOPICS = 8
WANTED = 0.8
"""The power that enough rows have."""
MOST_ROWS = 1_000_000
FEWEST_REFERENCE = 40
"""The fewest rows from which topics can be formed."""


@dataclass(frozen=True)
class Power:
    """Power of the embedding test at this check's level, if `share` of the live rows move to one topic of the reference."""

    share: float
    power: float
    live_rows: int
    reference_rows: int
    live_rows_needed: int | None
    """Live rows for 80% power with the available reference rows; None if no number is enough."""
    rows_needed: int
    """Rows of each side for 80% power."""
    can_alarm: bool = True
    """False if, with so few permutations, no p-value can be small enough: the power is 0 then, with any number of rows."""


def estimate_power(
    discrepancy: MeanDiscrepancy,
    permuted: np.ndarray,
    is_live: np.ndarray,
    level: float,
    share: float,
    seed: int = 0,
) -> Power | None:
    """Estimate the power from the reference rows alone; None with fewer than FEWEST_REFERENCE.

    The alternative takes `share` of the live rows from one of TOPICS clusters of the reference, and the others from all of it; the
    median cluster counts. The statistic is then about normal: its mean grows by share^2 times the cluster's own
    discrepancy, its variance by that of the witness function (Gretton and others 2012, corollary 16). The permutations give its
    distribution without drift; it scales with 1/live + 1/reference.

    permuted: statistics of the permutations. level: p-value below which the signal alarms, 0 where none is small enough.
    """
    reference = discrepancy.features[~is_live].astype(np.float64)
    if len(reference) < FEWEST_REFERENCE:
        return None
    if level == 0:
        return Power(share, 0.0, int(is_live.sum()), len(reference), None, MOST_ROWS, can_alarm=False)
    gains, spreads = _effects_of_topics(reference, share, seed)
    live_rows, reference_rows = int(is_live.sum()), len(reference)
    scale = 1 / live_rows + 1 / reference_rows
    ordered = np.sort(permuted)
    critical = ordered[min(int(np.ceil((1 - level) * len(ordered))), len(ordered) - 1)] / scale
    mean, variance = permuted.mean() / scale, permuted.var() / scale**2

    def power_at(live: float, others: float) -> float:
        from scipy.stats import norm

        size = 1 / live + 1 / others
        deviation = np.sqrt(variance * size**2 + spreads * size)
        return float(np.median(norm.sf((critical * size - mean * size - gains) / deviation)))

    return Power(
        share,
        power_at(live_rows, reference_rows),
        live_rows,
        reference_rows,
        _fewest_rows(lambda rows: power_at(rows, reference_rows)),
        _fewest_rows(lambda rows: power_at(rows, rows)) or MOST_ROWS,
    )


def _effects_of_topics(reference: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return, by topic, the growth of the squared discrepancy and 4 times the variance of the witness function, [topics]."""
    from sklearn.cluster import KMeans

    count = min(TOPICS, len(reference) // 5)
    labels = KMeans(count, n_init=2, random_state=seed).fit_predict(reference)
    mean = reference.mean(axis=0)
    differences = np.stack([reference[labels == topic].mean(axis=0) - mean for topic in np.unique(labels)])
    witness = reference @ differences.T
    return share**2 * np.sum(differences**2, axis=1), 4 * share**2 * witness.var(axis=0)


def _fewest_rows(power_at: Callable[[float], float]) -> int | None:
    """Return the smallest number of rows with 80% power, by bisection to 1%; None if MOST_ROWS does not reach it."""
    low, high = 2, MOST_ROWS
    if power_at(high) < WANTED:
        return None
    while high - low > max(1, low // 100):
        middle = (low + high) // 2
        low, high = (low, middle) if power_at(middle) >= WANTED else (middle, high)
    return high
