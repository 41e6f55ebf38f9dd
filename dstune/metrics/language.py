"""Metrics of language models."""

from __future__ import annotations

import math


def language_model_metrics(loss_sum: float, weight: float, correct: float, size: int = 0) -> dict[str, float]:
    """Return the mean loss in nats per target token, its exponential (perplexity), and the share of correctly predicted targets.

    loss_sum: over all targets, in nats. weight: number of targets. correct: number of targets predicted. size: bytes of the
    targets' text; 0 if unknown. `bits_per_byte` is the number of bits for all targets, including ends of turns and of documents,
    divided by these bytes; unlike the others it can be compared between tokenizers.
    """
    loss = loss_sum / weight
    bits = {"bits_per_byte": loss_sum / math.log(2) / size} if size else {}
    return {
        "loss": loss,
        "perplexity": math.exp(loss) if loss < 700 else math.inf,
        "token_accuracy": correct / weight,
        **bits,
        "targets": weight,
    }
