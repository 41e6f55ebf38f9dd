"""Caches of keys and values: those of several sequences become one, padded on the left, and one is taken apart again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def is_joinable(model: Any) -> bool:
    """Return whether the keys and values of a sequence are all that the model remembers."""
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    layers = DynamicCache(config=model.config).layers
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def new_cache(model: Any, *, plain: bool) -> Any:
    """Return an empty cache; `plain` keeps every position, also where a layer looks at the last ones only."""
    from transformers.cache_utils import DynamicCache

    return DynamicCache() if plain else DynamicCache(config=model.config)


def map_cache(cache: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Change the keys and values of each layer, [batch, heads, positions, width], in place."""
    for layer in cache.layers:
        if layer.is_initialized and layer.keys is not None:
            layer.keys, layer.values = change(layer.keys), change(layer.values)
    return cache


def widened(cache: Any, width: int) -> Any:
    """Return the cache with so many positions, padded on the left."""
    pad = torch.nn.functional.pad
    return map_cache(cache, lambda tensor: pad(tensor, (0, 0, width - tensor.shape[2], 0)))


def joined(first: Any, second: Any) -> Any:
    """Return one cache of the sequences of both."""
    for layer, other in zip(first.layers, second.layers, strict=True):
        if layer.is_initialized and layer.keys is not None:
            layer.keys = torch.cat([layer.keys, other.keys])
            layer.values = torch.cat([layer.values, other.values])
    return first
