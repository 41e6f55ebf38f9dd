"""Causal attention of each sample on its own, on a CPU: nothing is computed between samples of a packed row, or for padding.

The forward pass is torch's fused kernel, called for one sample after the other. Its backward kernel takes several times as long
as the products of matrices that it consists of, so those are made here (Dao et al. 2022, arXiv:2205.14135, section 3.1):
probabilities come again from the queries, the keys and the sum that the forward kernel keeps for each row.
`benchmarks/attention.py` measures it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from dstune.models.spans import Spans

QUERIES, SCORES = 128, 2**20
"""Positions, and scores of all heads, that the backward pass has at once at most; in fp32 these are 4 MB. More positions are fewer
products, but more scores of keys that lie ahead of them."""

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def computes(query: torch.Tensor, value: torch.Tensor) -> bool:
    """Return whether the kernel takes these states."""
    formats = (torch.bfloat16, torch.float32, torch.float64)
    return query.device.type == "cpu" and query.dtype in formats and query.shape[-1] == value.shape[-1]


class CausalAttention(torch.autograd.Function):
    """(query [rows, heads, positions, size], key and value [rows, key heads, positions, size], spans, scale, window)
    -> [rows, heads, positions, size], zero outside of the spans. Heads of keys divide those of queries, and are not repeated.

    window: how far back a position looks, itself included; None for all of its sample.
    """

    @staticmethod
    def forward(
        context: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        spans: Spans,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        rows, heads, positions, size = query.shape
        groups = (key.shape[1], heads // key.shape[1])
        output = query.new_zeros(rows, positions, heads, size).transpose(1, 2)
        accurate = torch.float64 if query.dtype is torch.float64 else torch.float32
        sums = torch.zeros(rows, heads, positions, dtype=accurate)
        for row, first, end, first_key, _ in _pieces(spans, window):
            # Heads of keys stand in place of a batch: a head of queries reads its own without a copy of it.
            states = (part[row, :, first_key:end].unsqueeze(1).expand(*groups, -1, -1) for part in (key, value))
            mask = None
            if first_key < first:
                allowed = query.new_ones(end - first, end - first_key, dtype=torch.bool)
                mask = query.new_zeros(allowed.shape).masked_fill_(
                    ~_visible(allowed, first - first_key, window), -torch.inf
                )
            attended, sum_of_row = _forward(
                query[row, :, first:end].unflatten(0, groups), *states, 0.0, mask is None, attn_mask=mask, scale=scale
            )
            output[row, :, first:end] = attended.flatten(0, 1)
            sums[row, :, first:end] = sum_of_row.flatten(0, 1)
        context.save_for_backward(query, key, value, output, sums)
        context.spans, context.scale, context.window = spans, scale, window
        return output

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        query, key, value, output, sums = context.saved_tensors
        (gradient,) = gradients
        grad_query = torch.zeros_like(query)
        # In full: a key is read by several blocks of queries.
        grad_key, grad_value = (torch.zeros_like(part, dtype=sums.dtype) for part in (key, value))
        products = (gradient.to(sums.dtype) * output).sum(dim=-1)
        heads, key_heads = query.shape[1], key.shape[1]
        for row, first, end, start, behind in _pieces(context.spans, context.window):
            step = max(16, min(QUERIES, SCORES // (heads * (end - start))))
            for low in range(first, end, step):
                high = min(low + step, end)
                # What this block sees, and how many of its own positions are seen by its first one.
                first_key = start if behind is None else max(start, low - behind + 1)
                query_span, key_span = (row, slice(None), slice(low, high)), (row, slice(None), slice(first_key, high))
                block = (heads // key_heads, high - low)
                queries, grad_outputs = (
                    part[query_span].unflatten(0, (key_heads, -1)).reshape(key_heads, -1, part.shape[-1])
                    for part in (query, gradient)
                )
                keys, values = key[key_span], value[key_span]
                minus_sum, minus_product = (
                    part[query_span].reshape(key_heads, -1, 1).neg() for part in (sums, products)
                )
                exact = sums.dtype
                shares = torch.baddbmm(minus_sum, queries.to(exact), keys.to(exact).mT, alpha=context.scale).exp_()
                _visible(shares.unflatten(1, block), low - first_key, behind)
                scores = torch.baddbmm(minus_product, grad_outputs.to(exact), values.to(exact).mT).mul_(shares)
                shares, scores = shares.to(query.dtype), scores.to(query.dtype)
                grad_query[query_span] = torch.bmm(scores, keys).mul_(context.scale).view(heads, high - low, -1)
                grad_key[key_span] += torch.bmm(scores.mT, queries).mul_(context.scale)
                grad_value[key_span] += torch.bmm(shares.mT, grad_outputs)
        return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), None, None, None


def _pieces(spans: Spans, window: int | None) -> Iterator[tuple[int, int, int, int, int | None]]:
    """Yield (row, first position, position behind the last, first position that they see, window) of what is computed at once: a
    sample, or so much of a longer one as its window is, so that a mask has at most 2 x window^2 elements."""
    for row, of_row in enumerate(spans):
        for start, end in of_row:
            if window is None or end - start <= window:
                yield row, start, end, start, None
                continue
            for first in range(start, end, window):
                yield row, first, min(first + window, end), max(start, first - window + 1), window


def _visible(scores: torch.Tensor, seen_before: int, window: int | None) -> torch.Tensor:
    """Return `scores` [..., positions, what they see] with zeros for what lies ahead of a position or behind its window.

    seen_before: how many positions are seen that stand before the first one. Changed in place."""
    # Zeros, and not products with them: of what lies ahead the exponential may be infinite.
    scores[..., seen_before:].tril_() if window is None else scores.tril_(seen_before)
    return scores if window is None else scores.triu_(seen_before - window + 1)
