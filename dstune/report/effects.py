"""Estimates how much each key of a sweep matters for the results of its trials."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

LEAST_TRIALS = 3
"""For each key: fewer say more about chance than about the keys."""
MOST_LEVELS = 16
"""Number of quantiles that are used for a key with more values."""
LOG_RATIO = 20.0
"""Positive numbers whose largest exceeds the smallest by more than this factor are compared by their logarithm."""


def shares(values: Sequence[Mapping[str, Any]], reached: Sequence[float]) -> dict[str, float]:
    """Return, for each key, the share of the objective's variance that it explains alone, the largest first; empty if there are too
    few trials or all reached the same value.

    A forest of extremely randomized trees is fitted to the trials. For each value of a key, the prediction is averaged over all
    trials with that value inserted. The key's share is the variance of these averages divided by that of the predictions: the
    first-order part of functional ANOVA (Hutter et al. 2014) with the means of partial dependence (Greenwell et al. 2018,
    arXiv:1805.04755). For a full grid these are the main effects. Interactions of keys are part of no share.
    """
    keys = list(dict.fromkeys(key for trial_values in values for key in trial_values))
    if not keys or len(values) < max(4, LEAST_TRIALS * len(keys)):
        return {}
    import numpy as np
    from sklearn.ensemble import ExtraTreesRegressor

    columns = [positions([trial_values.get(key) for trial_values in values]) for key in keys]
    points, target = np.array(columns, dtype=float).T, np.array(reached, dtype=float)
    if np.ptp(target) == 0:
        return {}
    forest = ExtraTreesRegressor(n_estimators=64, random_state=0).fit(points, target)
    # The variance over all combinations of the values that occur, not over the trials: a sampler prefers some of them.
    whole = []
    variance_by_key = {}
    for at, key in enumerate(keys):
        levels = np.unique(points[:, at])
        if len(levels) > MOST_LEVELS:
            levels = np.unique(np.quantile(points[:, at], np.linspace(0, 1, MOST_LEVELS)))
        means = []
        for level in levels:
            moved = points.copy()
            moved[:, at] = level
            predicted = forest.predict(moved)
            means.append(predicted.mean())
            whole.append(predicted)
        variance_by_key[key] = float(np.var(means))
    total = float(np.var(np.concatenate(whole)))
    ordered = sorted(variance_by_key.items(), key=lambda item: -item[1])
    return {key: (share / total if total > 0 else 0.0) for key, share in ordered}


def is_logarithmic(numbers: Sequence[float]) -> bool:
    return min(numbers) > 0 and max(numbers) / min(numbers) > LOG_RATIO


def are_numbers(values: Sequence[Any]) -> bool:
    return all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)


def positions(values: Sequence[Any]) -> list[float]:
    """Return values as numbers: themselves, their logarithm where they span much, or their place among all (by their text)."""
    if are_numbers(values):
        return [math.log(value) for value in values] if is_logarithmic(values) else [float(value) for value in values]
    names = sorted({str(value) for value in values})
    return [float(names.index(str(value))) for value in values]
