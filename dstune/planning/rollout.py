"""Memory and time of a step's completions, where the model answers prompts before it trains on them."""

from __future__ import annotations

from math import ceil

from dstune.planning.setup import Setup

BYTES_PER_LOGIT = 40
"""Of sampling, for each token of the vocabulary and completion: logits and log-probabilities in fp32, noise in 64 bits with what
it is mixed from."""


def completions_at_once(s: Setup) -> int:
    """Return the completions of a rank that are written together: all those of a micro-batch of prompts."""
    return min(s.micro_batch_size, s.global_batch_size) * s.answers


def cache_bytes(s: Setup) -> int:
    """Return keys and values of the completions that are written together, at their full length."""
    m = s.model
    return completions_at_once(s) * s.length * m.layers * 2 * m.kv_heads * m.head_dim * s.weight_bytes


def sampling_bytes(s: Setup) -> int:
    """Return what is held beside the weights when the last token is drawn: the cache twice, while a token is added to it in a
    layer, and the logits."""
    m = s.model
    added = cache_bytes(s) // m.layers
    return cache_bytes(s) + added + completions_at_once(s) * m.vocabulary * BYTES_PER_LOGIT


def rollout_seconds(s: Setup, flops: float, bandwidth: float) -> float:
    """Return time to write the longest completions of a step, without what rewards take.

    For every token all weights and half of the finished cache are read; the prompts are read once each. flops: operations a second;
    bandwidth: bytes a second, both of one rank.
    """
    if not s.written:
        return 0.0
    m = s.model
    weights = sum(tensor.count for tensor in m.tensors)
    read = weights * s.weight_bytes + cache_bytes(s) / 2
    computed = 2.0 * weights * completions_at_once(s)
    token = max(read / bandwidth, computed / flops)
    prompts = min(s.micro_batch_size, s.global_batch_size)
    prompt = 2.0 * weights * prompts * max(0, s.length - s.written) / flops
    batches = ceil(ceil(s.global_batch_size / prompts) / s.groups)
    return batches * (s.written * token + prompt)
