"""Computes memory and time of the completions that a model writes before it trains on them."""

from __future__ import annotations

from math import ceil

from dstune.planning.setup import Setup

BYTES_PER_LOGIT = 40
"""Bytes that sampling takes for each completion and token of the vocabulary: logits and log-probabilities in fp32, and noise with
its intermediate values in 64 bits."""


def completions_at_once(s: Setup) -> int:
    """Return how many completions a rank writes at the same time: those of all prompts of a micro-batch."""
    return min(s.micro_batch_size, s.global_batch_size) * s.answers


def cache_bytes(s: Setup) -> int:
    """Return the bytes of keys and values of the completions that are written at the same time, at their full length."""
    m = s.model
    return completions_at_once(s) * s.length * m.layers * 2 * m.kv_heads * m.head_dim * s.weight_bytes


def sampling_bytes(s: Setup) -> int:
    """Return the bytes that are in memory in addition to the weights when the last token is sampled: the cache, one layer of it
    twice (while a token is added), and the logits."""
    m = s.model
    layer_copy = cache_bytes(s) // m.layers
    return cache_bytes(s) + layer_copy + completions_at_once(s) * m.vocabulary * BYTES_PER_LOGIT


def rollout_seconds(s: Setup, flops: float, bandwidth: float) -> float:
    """Return the seconds to write completions of the maximum length for one step, without the time for rewards.

    Each token reads all weights and, on average, half of the final cache; each prompt is read once.

    flops: operations per second of one rank. bandwidth: bytes per second of one rank.
    """
    if not s.written:
        return 0.0
    m = s.model
    weights = sum(tensor.count for tensor in m.tensors)
    bytes_per_token = weights * s.weight_bytes + cache_bytes(s) / 2
    flops_per_token = 2.0 * weights * completions_at_once(s)
    token_seconds = max(bytes_per_token / bandwidth, flops_per_token / flops)
    prompts = min(s.micro_batch_size, s.global_batch_size)
    prompt_seconds = 2.0 * weights * prompts * max(0, s.length - s.written) / flops
    batches = ceil(ceil(s.global_batch_size / prompts) / s.groups)
    return batches * (s.written * token_seconds + prompt_seconds)
