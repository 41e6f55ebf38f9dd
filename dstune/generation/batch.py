"""Decodes rows together: one token for each row and forward pass; rows join and leave between two tokens (Yu et al. 2022, Orca:
continuous batching)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from dstune.generation.cache import join_caches, layer_kinds, map_cache, new_cache, pad_cache
from dstune.models.shared_prompts import NAME as SHARED_PROMPTS
from dstune.models.spans import attention_problem


class Batch:
    """Rows that are decoded together: their keys and values, padded on the left, and the positions of their next tokens."""

    def __init__(self, model: nn.Module, cache: Any, mask: Tensor, positions: Tensor):
        """cache: of the tokens so far. mask: int64 [rows, width], 0 for padding. positions: of the next tokens, int64 [rows, 1]."""
        self._model, self._takes_ready_masks = model, takes_ready_masks(model)
        self.cache, self.mask, self.positions = cache, mask, positions
        self._is_padded = not bool(mask.all())

    def __len__(self) -> int:
        return len(self.mask)

    def step(self, tokens: Tensor) -> Tensor:
        """Add a token to each row; return the logits of the next ones, [rows, vocabulary]. tokens: int64 [rows]."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], dim=1)
        mask: Tensor | None = self.mask
        if self._takes_ready_masks:
            mask = self.mask[:, None, None].bool() if self._is_padded else None
        logits = last_logits(self._model, tokens[:, None], mask, self.positions, self.cache)
        self.positions = self.positions + 1
        return logits

    def repeat(self, copies: int) -> None:
        """Put `copies` copies of each row in its place, one after the other."""
        self.cache.batch_repeat_interleave(copies)
        self.mask = self.mask.repeat_interleave(copies, dim=0)
        self.positions = self.positions.repeat_interleave(copies, dim=0)

    def join(self, other: Batch) -> None:
        """Append the rows of another batch, which must not be used afterwards. The caches must be joinable."""
        width = max(self.mask.shape[1], other.mask.shape[1])
        self.cache = join_caches(pad_cache(self.cache, width), pad_cache(other.cache, width))
        masks = [nn.functional.pad(mask, (width - mask.shape[1], 0)) for mask in (self.mask, other.mask)]
        self.mask = torch.cat(masks)
        self.positions = torch.cat([self.positions, other.positions])
        self._is_padded = not bool(self.mask.all())

    def keep(self, rows: Sequence[int]) -> None:
        """Keep the rows with these numbers, at least one, without the columns that are padding in all of them. The cache must be
        joinable."""
        index = torch.tensor(rows, device=self.mask.device)
        mask = self.mask[index]
        first = int(mask.argmax(dim=1).min())
        self.mask, self.positions = mask[:, first:], self.positions[index]
        map_cache(self.cache, lambda tensor: tensor[index.to(tensor.device), :, first:])
        self._is_padded = not bool(self.mask.all())


def read(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> tuple[Batch, Tensor]:
    """Read prompts; return them as a batch, and the logits of the next tokens, [rows, vocabulary].

    input_ids, attention_mask: int64 [rows, sequence], padded on the left.
    """
    cache, positions = new_cache(model), positions_of(attention_mask)
    logits = last_logits(model, input_ids, attention_mask, positions, cache)
    return Batch(model, cache, attention_mask, positions[:, -1:] + 1), logits


def pad(
    rows: Sequence[Sequence[int]], padding: int, device: torch.device, *, on_left: bool = True
) -> tuple[Tensor, Tensor]:
    """Return `input_ids` and `attention_mask` of rows of tokens, int64 [rows, longest]."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), padding)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        places = slice(width - len(row), None) if on_left else slice(len(row))
        ids[number, places] = torch.tensor(row, dtype=torch.long)
        mask[number, places] = 1
    return ids.to(device), mask.to(device)


def positions_of(mask: Tensor) -> Tensor:
    """Return the position of each token in its row, not counting padding, [rows, sequence]."""
    return (mask.cumsum(dim=1) - 1).clamp(min=0)


def takes_ready_masks(model: Any) -> bool:
    """Return whether the model accepts a mask of one token for all layers, [rows, 1, 1, tokens] or None. Otherwise it builds one
    from [rows, tokens] for every token."""
    base = below_adapters(model)
    by_sdpa = base.config._attn_implementation in ("sdpa", SHARED_PROMPTS) and attention_problem(base) is None
    return by_sdpa and layer_kinds(model) == {"DynamicLayer"}


def last_logits(
    model: nn.Module, ids: Tensor, mask: Tensor | None, positions: Tensor | None, cache: Any, **inputs: Any
) -> Tensor:
    """Return the logits of the token after the last one of each row, [rows, vocabulary].

    ids: int64 [rows, new tokens], by which the cache grows. positions: None for those after the cache's. inputs: what the model
    gets beside tokens, such as pixels.
    """
    parameters = _parameters(model)
    keys_and_values = "cache" if "cache" in parameters else "past_key_values"  # of transformers before 5.24
    options = {keys_and_values: cache} | ({"logits_to_keep": 1} if "logits_to_keep" in parameters else {}) | inputs
    options |= {} if positions is None else {"position_ids": positions}
    output = model(input_ids=ids, attention_mask=mask, use_cache=True, **options)
    logits: Tensor = output.logits[:, -1]
    return logits


def below_adapters(model: Any) -> Any:
    """Return the model without peft's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _parameters(model: Any) -> frozenset[str]:
    base = below_adapters(model)
    return _names_of_parameters(getattr(base.forward, "__func__", base.forward))


@lru_cache(maxsize=4)
def _names_of_parameters(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)
