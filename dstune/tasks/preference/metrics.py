"""Metrics of preferences."""

from __future__ import annotations

from collections.abc import Mapping


def preference_metrics(loss_sum: float, weight: float, correct: float, sums: Mapping[str, float]) -> dict[str, float]:
    """Return mean loss of a pair (with `kto` of an answer), share of them that the rewards get right, mean reward and
    log-probability of the better and the worse answers, and how far the rewards are apart.

    sums: of rewards and log-probabilities, and the numbers `chosen` and `rejected` of both kinds of answers.
    """
    metrics = {"loss": loss_sum / weight, "reward_accuracy": correct / weight}
    for kind in ("chosen", "rejected"):
        if sums[kind]:
            for name in ("reward", "logps"):
                metrics[f"{name}_{kind}"] = sums[f"{name}_{kind}"] / sums[kind]
    if sums["chosen"] and sums["rejected"]:
        metrics["reward_margin"] = metrics["reward_chosen"] - metrics["reward_rejected"]
    return {**metrics, "targets": weight}
