"""Metrics of language models."""

from __future__ import annotations

import math


def language_model_metrics(loss_sum: float, weight: float, correct: float) -> dict[str, float]:
    """Mean loss in nats per target token, its exponential, and the share of targets predicted."""
    loss = loss_sum / weight
    return {
        "loss": loss,
        "perplexity": math.exp(loss) if loss < 700 else math.inf,
        "token_accuracy": correct / weight,
        "targets": weight,
    }
