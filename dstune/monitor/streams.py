"""Finds when a number changed: ADWIN over the live conversations in time order (Bifet and Gavalda, SDM 2007, by `river`)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dstune.core.errors import Problem, UserError

FEWEST = 100
"""The fewest conversations of a stream: with fewer, ADWIN has no power."""


@dataclass(frozen=True)
class Change:
    """A change of a signal's mean among the live conversations."""

    signal: str
    index: int
    """Index of the first conversation after the change."""
    time: float | None
    before: float
    after: float
    """Means of the signal before and after the change."""


def require_river() -> None:
    """Raises UserError if river is not installed."""
    try:
        import river.drift  # noqa: F401
    except ImportError as error:
        fix = "pip install '.[monitor]' in a clone of dstune, or --no-streams"
        raise UserError(Problem("--streams", "needs the package river", fix)) from error


def find_change(
    signal: str, values: np.ndarray, times: np.ndarray | None, reference: np.ndarray, delta: float
) -> Change | None:
    """Return the change of a stream; None if there is none. ADWIN decides whether there is a change. Its buckets are too coarse to
    locate it, so it is placed where two means fit the stream best. values: float [conversations] in time order, NaN for a missing
    one. reference: values without drift, whose distribution maps the stream to [0, 1] as ADWIN's bound requires. delta: ADWIN's
    bound on a false alarm."""
    from river.drift import ADWIN

    is_known = np.isfinite(values)
    measured, numbers = values[is_known], np.flatnonzero(is_known)
    scale = np.sort(reference[np.isfinite(reference)])
    if len(measured) < FEWEST or len(scale) < FEWEST:
        return None
    places = (np.searchsorted(scale, measured, "left") + np.searchsorted(scale, measured, "right")) / (2 * len(scale))
    detector = ADWIN(delta=delta)
    has_changed = False
    for place in places:
        detector.update(float(place))
        has_changed = has_changed or detector.drift_detected
    if not has_changed:
        return None
    begin = _best_split(places)
    index = int(numbers[begin])
    return Change(
        signal,
        index,
        None if times is None else float(times[index]),
        float(measured[:begin].mean()),
        float(measured[begin:].mean()),
    )


def _best_split(values: np.ndarray) -> int:
    """Return the index at which two means leave the smallest sum of squares."""
    counts = np.arange(1, len(values))
    sums = np.cumsum(values)
    sums_before, sums_after = sums[:-1], sums[-1] - sums[:-1]
    return int(np.argmax(sums_before**2 / counts + sums_after**2 / (len(values) - counts))) + 1
