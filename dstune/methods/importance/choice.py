"""Chooses the tensors or entries to train from their scores, with pure functions. `scores.py` computes the scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch


def chosen_tensors(scores: Mapping[str, float], sizes: Mapping[str, int], share: float) -> list[str]:
    """Return the names with the highest scores whose sizes sum to at most `share` of all. Tensors that do not fit are skipped.

    The one with the highest score is always taken.
    """
    budget = share * sum(sizes.values())
    ordered = sorted(scores, key=lambda name: (-scores[name], name))
    chosen, used = [ordered[0]], sizes[ordered[0]]
    for name in ordered[1:]:
        if used + sizes[name] <= budget:
            chosen.append(name)
            used += sizes[name]
    return chosen


def sortable(scores: torch.Tensor) -> torch.Tensor:
    """Return int32 keys with the order of the fp32 scores, so that a threshold can be found bit by bit. Negative floats are
    converted: their bits, read as an integer, fall as the float rises."""
    bits = scores.float().contiguous().view(torch.int32)
    return torch.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)


def threshold(count_from: Callable[[int], int], target: int) -> int:
    """Return the lowest key for which `count_from(key)`, the number of entries on all ranks with this key or a higher one, is at
    most `target`. Entries with equal scores are taken together or not at all."""
    low, high = -(2**31), 2**31
    while low < high:
        middle = (low + high) // 2
        if count_from(middle) <= target:
            high = middle
        else:
            low = middle + 1
    return low


def rank_correlation(first: Mapping[str, float], second: Mapping[str, float]) -> dict[str, Any]:
    """Return Spearman's rank correlation of two scores of the same tensors, and its p-value: the probability of a correlation at
    least as far from 0 by chance."""
    from scipy.stats import spearmanr

    names = sorted(first)
    correlation = spearmanr([first[name] for name in names], [second[name] for name in names])
    return {"spearman": float(correlation.statistic), "p": float(correlation.pvalue), "tensors": len(names)}
