"""Computes causal attention for each sample separately on a CPU, and nothing between samples of a packed row or for padding.

The forward pass calls torch's fused kernel for one sample after another. torch's backward kernel takes several times as long as
its matrix products alone, so they are computed here (Dao et al. 2022, arXiv:2205.14135, section 3.1): probabilities are computed
again from the queries, the keys and the sum that the forward kernel keeps for each query.
`benchmarks/attention.py` measures it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from dstune.models.spans import Spans

QUERIES, SCORES = 128, 2**20
"""Most positions, and most scores of all heads (4 MB in fp32), that the backward pass computes at once. With more positions there
are fewer products, but more useless scores of later keys."""

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def computes(query: torch.Tensor, value: torch.Tensor) -> bool:
    """Return whether the kernel supports these states."""
    formats = (torch.bfloat16, torch.float32, torch.float64)
    return query.device.type == "cpu" and query.dtype in formats and query.shape[-1] == value.shape[-1]


class CausalAttention(torch.autograd.Function):
    """Maps (query [rows, heads, positions, size], key and value [rows, key heads, positions, size], spans, scale, window) to
    [rows, heads, positions, size], zero outside of the spans. The number of key heads divides that of the query heads.

    window: how many positions each one sees, including itself; None for the entire sample.
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
            # Key heads take the place of a batch, so that query heads read them without a copy.
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
        # In the exact format: several blocks of queries add to the gradient of a key.
        grad_key, grad_value = (torch.zeros_like(part, dtype=sums.dtype) for part in (key, value))
        products = (gradient.to(sums.dtype) * output).sum(dim=-1)
        heads, key_heads = query.shape[1], key.shape[1]
        for row, first, end, start, window in _pieces(context.spans, context.window):
            step = max(16, min(QUERIES, SCORES // (heads * (end - start))))
            for low in range(first, end, step):
                high = min(low + step, end)
                # The first key that this block sees.
                first_key = start if window is None else max(start, low - window + 1)
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
                _visible(shares.unflatten(1, block), low - first_key, window)
                scores = torch.baddbmm(minus_product, grad_outputs.to(exact), values.to(exact).mT).mul_(shares)
                shares, scores = shares.to(query.dtype), scores.to(query.dtype)
                grad_query[query_span] = torch.bmm(scores, keys).mul_(context.scale).view(heads, high - low, -1)
                grad_key[key_span] += torch.bmm(scores.mT, queries).mul_(context.scale)
                grad_value[key_span] += torch.bmm(shares.mT, grad_outputs)
        return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), None, None, None


def _pieces(spans: Spans, window: int | None) -> Iterator[tuple[int, int, int, int, int | None]]:
    """Yield (row, first position, end, first position that they see, window) of each piece computed at once: a sample, or `window`
    positions of a longer one, so that a mask has at most 2 x window^2 elements."""
    for row, of_row in enumerate(spans):
        for start, end in of_row:
            if window is None or end - start <= window:
                yield row, start, end, start, None
                continue
            for first in range(start, end, window):
                yield row, first, min(first + window, end), max(start, first - window + 1), window


def _visible(scores: torch.Tensor, seen_before: int, window: int | None) -> torch.Tensor:
    """Set the scores of keys after a position, or before its window, to zero, in place; return `scores` [..., positions, keys].

    seen_before: number of keys before the first position.
    """
    # Not by a product with zeros: the exponential for later keys may be infinite.
    scores[..., seen_before:].tril_() if window is None else scores.tril_(seen_before)
    return scores if window is None else scores.triu_(seen_before - window + 1)
