"""Changes key-value caches: joins those of several sequences, pads them on the left, and applies a function to their tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def is_joinable(model: Any) -> bool:
    """Return whether keys and values are the model's only state of a sequence."""
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    layers = DynamicCache(config=model.config).layers
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def new_cache(model: Any, *, plain: bool) -> Any:
    """Return an empty cache. plain: keep every position, even if a layer attends only to the last ones."""
    from transformers.cache_utils import DynamicCache

    return DynamicCache() if plain else DynamicCache(config=model.config)


def map_cache(cache: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Replace the keys and values of each layer, [batch, heads, positions, width], in place, and return the cache."""
    for layer in cache.layers:
        if layer.is_initialized and layer.keys is not None:
            layer.keys, layer.values = change(layer.keys), change(layer.values)
    return cache


def pad_cache(cache: Any, width: int) -> Any:
    """Pad a cache on the left to `width` positions, in place, and return it."""
    pad = torch.nn.functional.pad
    return map_cache(cache, lambda tensor: pad(tensor, (0, 0, width - tensor.shape[2], 0)))


def join_caches(first: Any, second: Any) -> Any:
    """Append the sequences of the second cache to the first, in place, and return the first. Both have equally many positions."""
    for first_layer, second_layer in zip(first.layers, second.layers, strict=True):
        if first_layer.is_initialized and first_layer.keys is not None:
            first_layer.keys = torch.cat([first_layer.keys, second_layer.keys])
            first_layer.values = torch.cat([first_layer.values, second_layer.values])
    return first
