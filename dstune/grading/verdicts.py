"""Decide from paired scores whether a candidate is as good within the allowed loss, certainly worse, or neither.

All gates of a comparison share one error budget, `error`:

- A gate passes if the candidate is shown to lose less than the margin, at the level `error`. A candidate that loses more in one set
  passes all of them only if the test errs on that set, so passing needs no correction (intersection-union test: Berger 1982).
- A gate is worse if the candidate is shown to lose more than the margin, at the level `error` divided by the number of gates
  (Bonferroni). A candidate within all margins is refused with probability `error` at most, however many gates there are.
- Any other gate is undecided. It reports how many rows would decide it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

PASSED, WORSE, UNDECIDED = "passed", "worse", "undecided"
SLICE_ROWS = 20
"""A slice with fewer rows is not judged."""
FEWEST = 5
"""A set with fewer rows is not judged."""
POWER = 0.8
"""Probability that an equally good candidate passes all sets (or all probes), if each has the rows that its gate asks for."""

SHARES, LOG_PROBABILITIES = "points", "nats a token"
"""Units of a score: a share from 0 to 1 (a hit is 1; 0.01 is a percentage point), or a mean log-probability."""


@dataclass(frozen=True)
class Comparison:
    """Scores of the same rows by both versions, [rows] each; larger is better."""

    name: str
    current: np.ndarray
    candidate: np.ndarray
    margin: float
    """How much of its mean the candidate may lose."""
    unit: str = SHARES
    is_set: bool = False
    """Whether these are all rows of a set; at least one set has to pass."""
    has_to_pass: bool = False
    """Whether the candidate is held as long as this gate is undecided, however few its rows."""
    keeps_each: bool = False
    """Whether the rows are not a sample: every row that the current version gets right has to stay right."""


@dataclass(frozen=True)
class GateResult:
    """The result of a gate."""

    name: str
    rows: int
    current: float
    candidate: float
    low: float
    high: float
    """Bounds of the mean difference, candidate minus current: one-sided, at the levels for passing and for being worse."""
    margin: float
    verdict: str
    reason: str
    is_set: bool = False
    rows_needed: int | None = None
    """For an undecided gate: the number of rows with which an equally good candidate would pass; None if no number suffices."""
    holds: bool = False
    """Whether the candidate is held because this gate has to pass and is undecided."""
    loses: bool = False
    """Whether the candidate is shown to lose something, at the level `error`, even if that is within the margin."""

    @property
    def gain(self) -> float:
        return self.candidate - self.current


def level_of_worse(error: float, gates: int) -> float:
    """Return the level at which each of `gates` is tested for being worse."""
    return error / max(1, gates)


def decide(comparisons: Sequence[Comparison], error: float, gates: int) -> list[GateResult]:
    """Decide the gates of `comparisons`. error: the budget of all gates together. gates: how many share it, including others."""
    sets = sum(comparison.is_set for comparison in comparisons)
    required = sum(comparison.has_to_pass for comparison in comparisons)
    worse = level_of_worse(error, gates)
    return [
        _decide_fixed(comparison)
        if comparison.keeps_each
        else _decide_sampled(
            comparison, error, worse, sets if comparison.is_set else required if comparison.has_to_pass else 1
        )
        for comparison in comparisons
    ]


def _decide_sampled(comparison: Comparison, error: float, worse: float, alike: int) -> GateResult:
    """Decide one gate. error, worse: levels for passing and for being worse. alike: gates of its kind that all have to pass."""
    current, candidate, margin = comparison.current, comparison.candidate, comparison.margin
    bounds = _share_bound if comparison.unit == SHARES else _mean_bound
    difference = candidate - current
    low, high = bounds(difference, error), -bounds(-difference, worse)
    verdict = PASSED if low >= -margin else WORSE if high < -margin else UNDECIDED
    reason = (
        f"{_amount(difference.mean(), comparison.unit)} {comparison.unit}, at least {_amount(low, comparison.unit)} and at most "
        f"{_amount(high, comparison.unit)}; {_amount(-margin, comparison.unit)} is allowed"
    )
    needed = None
    if verdict == UNDECIDED:
        needed = rows_needed(difference, margin, comparison.unit, error, alike)
        reason = f"undecided on {len(difference)} rows ({reason}): {_need(needed, len(difference))}"
    return GateResult(
        comparison.name, len(difference), float(current.mean()), float(candidate.mean()), low, high, margin, verdict, reason,
        comparison.is_set, needed, comparison.has_to_pass and verdict == UNDECIDED, -bounds(-difference, error) < 0,
    )  # fmt: skip


def _decide_fixed(comparison: Comparison) -> GateResult:
    current, candidate = comparison.current, comparison.candidate
    lost, difference = int((candidate < current).sum()), float((candidate - current).mean())
    verdict = WORSE if lost else PASSED
    reason = f"{lost} of {int((current > 0).sum())} right answers lost; each has to stay"
    return GateResult(
        comparison.name, len(current), float(current.mean()), float(candidate.mean()), difference, difference, 0.0,
        verdict, reason,
    )  # fmt: skip


def _amount(value: float, unit: str) -> str:
    return f"{100 * value:+.1f}" if unit == SHARES else f"{value:+.4f}"


def _need(needed: int | None, rows: int) -> str:
    if needed is None:
        return "no number of rows shows that a candidate loses nothing at all"
    if needed > rows:
        return f"{needed} rows needed"
    return "a candidate that is as good passes with so many rows in most cases, so this one is probably a little worse"


# -- bounds


def _share_bound(difference: np.ndarray, level: float) -> float:
    """Return the lower bound, at `level`, of the mean of differences [rows] between scores from 0 to 1.

    This is the score interval of Tango (1998) for the difference of two paired proportions. It is also valid for few rows: without
    a single difference in 20 rows the bound at 0.025 is -0.16. For scores between 0 and 1, gains and losses count by their size,
    which overstates their variance.
    """
    rows, gained, lost = len(difference), float(difference.clip(0).sum()), float((-difference).clip(0).sum())
    quantile = NormalDist().inv_cdf(1 - level)
    low, high = -1.0, (gained - lost) / rows
    for _ in range(40):
        middle = (low + high) / 2
        if _tango(rows, gained, lost, middle) > quantile:
            low = middle
        else:
            high = middle
    return low


def _tango(rows: int, gained: float, lost: float, difference: float) -> float:
    """Return the score statistic of the hypothesis that the true difference is `difference`."""
    linear = (2 * rows - gained + lost) * difference - gained - lost
    root = math.sqrt(max(0.0, linear**2 + 8 * rows * lost * difference * (1 - difference)))
    share_lost = (root - linear) / (4 * rows)
    variance = rows * (2 * share_lost + difference * (1 - difference))
    distance = gained - lost - rows * difference
    return math.inf if variance <= 0 else distance / math.sqrt(variance)


def _mean_bound(difference: np.ndarray, level: float) -> float:
    """Return the lower bound, at `level`, of the mean of differences [rows] of any size, by Student's t."""
    from scipy.stats import t

    rows = len(difference)
    error = float(difference.std(ddof=1)) / math.sqrt(rows)
    return float(difference.mean() - t.ppf(1 - level, rows - 1) * error)


def rows_needed(difference: np.ndarray, margin: float, unit: str, error: float, gates: int = 1) -> int | None:
    """Return how many rows a candidate that is exactly as good needs to pass `gates` gates of such rows with probability POWER.

    It follows from the variance of the differences [rows] (Chow and others 2017, chapter 3); the chance of failing is divided among
    the gates. None if no number of rows is enough, because no loss is allowed.
    """
    if margin <= 0:
        return None
    normal = NormalDist()
    passing, power = normal.inv_cdf(1 - error), normal.inv_cdf(1 - (1 - POWER) / max(1, gates))
    if unit == SHARES:
        # Add one row that differs: the measured rows may contain none by chance.
        variance = (float(np.abs(difference).sum()) + 1) / (len(difference) + 1)
        fewest = passing**2 * (1 - margin) / margin if margin < 1 else 0.0  # the inverse of `smallest_margin`
    else:
        variance, fewest = float(difference.var(ddof=1)), 0.0
    return math.ceil(max(fewest, (passing + power) ** 2 * variance / margin**2))


def smallest_margin(rows: int, error: float) -> float:
    """Return the smallest margin, a share, that a gate of `rows` rows passes if no score changes."""
    square = NormalDist().inv_cdf(1 - error) ** 2
    return square / (rows + square)


# -- as the ledger has them


def verdict_of(gate: Mapping[str, Any]) -> str:
    """Return the verdict of a gate in a ledger; lines of earlier versions have only `passed`."""
    if "verdict" in gate:
        return str(gate["verdict"])
    return PASSED if gate["passed"] else WORSE
