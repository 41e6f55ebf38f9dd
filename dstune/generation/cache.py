"""Changes key-value caches: joins those of several rows, pads them on the left, and applies a function to their tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def configuration_of(model: Any) -> Any:
    """Return the configuration of the text model below adapters."""
    return model.config.get_text_config(decoder=True)


def new_cache(model: Any, *, plain: bool = False) -> Any:
    """Return an empty cache. plain: keep every position, even if a layer attends only to the last ones."""
    from transformers.cache_utils import DynamicCache

    return DynamicCache() if plain else DynamicCache(config=configuration_of(model))


def layer_kinds(model: Any) -> set[str]:
    """Return what the layers of a model keep of a row: the names of transformers' classes. `DynamicLayer` alone means the keys and
    values of all tokens."""
    return {type(layer).__name__ for layer in new_cache(model).layers}


def is_joinable(model: Any) -> bool:
    """Return whether keys and values are the model's only state of a row, so that rows can join a batch whose cache is `plain`."""
    return layer_kinds(model) <= {"DynamicLayer", "DynamicSlidingWindowLayer"}


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
    """Append the rows of the second cache to the first, in place, and return the first. Both have equally many positions."""
    for first_layer, second_layer in zip(first.layers, second.layers, strict=True):
        if first_layer.is_initialized and first_layer.keys is not None:
            first_layer.keys = torch.cat([first_layer.keys, second_layer.keys])
            first_layer.values = torch.cat([first_layer.values, second_layer.values])
    return first
