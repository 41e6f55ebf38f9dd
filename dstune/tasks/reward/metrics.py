"""Metrics of reward models."""

from __future__ import annotations

from collections.abc import Mapping


def reward_metrics(loss_sum: float, weight: float, correct: float, sums: Mapping[str, float]) -> dict[str, float]:
    """Return the mean loss of a pair, the share of pairs whose better answer scores higher, and the mean scores."""
    better, worse = (sums[f"reward_{kind}"] / weight for kind in ("chosen", "rejected"))
    return {
        "loss": loss_sum / weight,
        "reward_accuracy": correct / weight,
        "reward_chosen": better,
        "reward_rejected": worse,
        "reward_margin": better - worse,
        "targets": weight,
    }
