"""Metrics of language models."""

from __future__ import annotations

import math


def language_model_metrics(loss_sum: float, weight: float, correct: float, size: int = 0) -> dict[str, float]:
    """Return mean loss in nats per target token, its exponential, and the share of targets predicted.

    size: bytes of the text that the targets stand for. `bits_per_byte` are the bits of all targets, ends of turns and of
    documents included, over them; unlike the others it can be compared between tokenizers.
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
