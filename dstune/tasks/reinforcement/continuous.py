"""Sample completions in a batch that is kept full: when some end, others take their place (Yu et al. 2022, Orca: continuous
batching).

The noise is that of `sampling.sample_completions`, so the tokens are the same except for rounding, since a row is computed beside
different ones. This saves the work for rows that end long before the longest row of their batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dstune.core.errors import Problem, UserError
from dstune.tasks.reinforcement.sampling import Completion, configuration_of, draw, last_logits, mixed, positions_of


@dataclass
class _Rows:
    """The completions being generated, one per row."""

    completions: list[Completion]
    keys: Tensor
    """Keys of the noise, int64 [rows]."""
    mask: Tensor
    """Attention mask, [rows, length of the cache]."""
    positions: Tensor
    """Position of the next token, [rows, 1]."""
    logits: Tensor
    """Logits of the next token, [rows, vocabulary]."""
    cache: Any


def sample_continuously(
    model: nn.Module,
    prompts: Sequence[tuple[int, Sequence[int]]],
    *,
    samples: int,
    rows: int,
    max_new_tokens: int,
    temperature: float,
    ends: Collection[int],
    padding: int,
    keys: tuple[int, int],
    device: torch.device,
) -> list[Completion]:
    """Return `samples` completions of each prompt (number, tokens), grouped by prompt. Generates at most `rows` at a time, or
    `samples` if that is more.

    Raises:
        UserError: the model's cache is not just the keys and values of all tokens (a sliding window, a state).
    """
    waiting = deque(prompts)
    done: dict[tuple[int, int], Completion] = {}
    ending = torch.tensor(sorted(ends), device=device)
    current: _Rows | None = None
    with torch.no_grad():
        while waiting or current is not None:
            current = _fill(model, current, waiting, samples, rows, padding, keys, device)
            token, logp, entropy = draw(current.logits, temperature, mixed(current.keys, _written(current)))
            ended = torch.isin(token, ending)
            _note(current, token.tolist(), logp.double().tolist(), entropy.tolist(), ended.tolist())
            is_over = [c.ended or len(c.ids) >= max_new_tokens for c in current.completions]
            done |= {(c.prompt, c.sample): c for c, over in zip(current.completions, is_over, strict=True) if over}
            going_on = [row for row, over in enumerate(is_over) if not over]
            if len(going_on) < len(is_over):
                current, token = _select(current, going_on, device), token[going_on]
            if current is not None:
                _advance(model, current, token)
    return [done[number, sample] for number, _ in prompts for sample in range(samples)]


def _written(rows: _Rows) -> Tensor:
    return torch.tensor([len(completion.ids) for completion in rows.completions], device=rows.keys.device)


def _note(rows: _Rows, tokens: list[int], logps: list[float], entropies: list[float], ended: list[bool]) -> None:
    drawn = zip(tokens, logps, entropies, ended, strict=True)
    for completion, (token, logp, entropy, has_ended) in zip(rows.completions, drawn, strict=True):
        completion.ids.append(token)
        completion.logps.append(logp)
        completion.entropy += entropy
        completion.ended = has_ended


def _advance(model: nn.Module, rows: _Rows, token: Tensor) -> None:
    """Compute the logits that follow the drawn tokens."""
    rows.mask = torch.cat([rows.mask, rows.mask.new_ones(len(token), 1)], dim=1)
    rows.logits = last_logits(model, token[:, None], rows.mask, rows.positions, rows.cache)
    rows.positions = rows.positions + 1


def _select(rows: _Rows, row_numbers: list[int], device: torch.device) -> _Rows | None:
    """Return the rows that continue, without the columns that are padding in all of them; None if no row continues."""
    if not row_numbers:
        return None
    index = torch.tensor(row_numbers, device=device)
    rows.cache.batch_select_indices(index)
    mask = rows.mask[index]
    padded = int((mask.cumsum(dim=1) == 0).sum(dim=1).min())
    if padded:
        for layer in rows.cache.layers:
            layer.keys, layer.values = layer.keys[:, :, padded:], layer.values[:, :, padded:]
    completions = [rows.completions[row] for row in row_numbers]
    return _Rows(completions, rows.keys[index], mask[:, padded:], rows.positions[index], rows.logits[index], rows.cache)


def _fill(
    model: nn.Module,
    current: _Rows | None,
    waiting: deque[tuple[int, Sequence[int]]],
    samples: int,
    most: int,
    padding: int,
    keys: tuple[int, int],
    device: torch.device,
) -> _Rows:
    """Return `current` with completions of the next prompts added, as long as all samples of a prompt fit."""
    room = most - (len(current.completions) if current is not None else 0)
    batch = [waiting.popleft() for _ in range(min(len(waiting), room // samples))]
    if not batch and current is None:  # a prompt has more samples than there are rows
        batch = [waiting.popleft()]
    if not batch:
        assert current is not None
        return current
    new = _read(model, batch, samples, padding, keys, device)
    return new if current is None else _joined(current, new)


def _read(
    model: nn.Module,
    prompts: Sequence[tuple[int, Sequence[int]]],
    samples: int,
    padding: int,
    keys: tuple[int, int],
    device: torch.device,
) -> _Rows:
    """Return rows for `prompts`; each prompt is computed once for all its samples."""
    from transformers import DynamicCache

    width = max(len(ids) for _, ids in prompts)
    ids = torch.tensor([[padding] * (width - len(row)) + list(row) for _, row in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for _, row in prompts], device=device)
    cache = DynamicCache(config=configuration_of(model))
    if any(type(layer).__name__ != "DynamicLayer" for layer in cache.layers):
        kinds = ", ".join(sorted({type(layer).__name__ for layer in cache.layers}))
        reason = f"the model keeps more than keys and values of all tokens ({kinds}), which are not cut here"
        raise UserError(Problem("task.rollout", reason, "task.rollout=exact", "fast"))
    logits = last_logits(model, ids, mask, positions_of(mask), cache)
    cache.batch_repeat_interleave(samples)
    numbers = torch.tensor([number for number, _ in prompts], device=device).repeat_interleave(samples)
    copies = torch.arange(samples, device=device).repeat(len(prompts))
    noise = mixed(mixed(mixed(torch.full_like(numbers, keys[0]), keys[1]), numbers), copies)
    completions = [Completion(number, sample) for number, _ in prompts for sample in range(samples)]
    mask = mask.repeat_interleave(samples, dim=0)
    return _Rows(
        completions, noise, mask, mask.sum(dim=1, keepdim=True), logits.repeat_interleave(samples, dim=0), cache
    )


def _joined(first: _Rows, second: _Rows) -> _Rows:
    """Return both joined into one batch; the shorter cache is padded on the left."""
    length = max(first.mask.shape[1], second.mask.shape[1])
    for rows in (first, second):
        if missing := length - rows.mask.shape[1]:
            rows.mask = nn.functional.pad(rows.mask, (missing, 0))
            for layer in rows.cache.layers:
                layer.keys = nn.functional.pad(layer.keys, (0, 0, missing, 0))
                layer.values = nn.functional.pad(layer.values, (0, 0, missing, 0))
    for layer, other in zip(first.cache.layers, second.cache.layers, strict=True):
        layer.keys = torch.cat([layer.keys, other.keys])
        layer.values = torch.cat([layer.values, other.values])
    return _Rows(
        first.completions + second.completions,
        torch.cat([first.keys, second.keys]),
        torch.cat([first.mask, second.mask]),
        torch.cat([first.positions, second.positions]),
        torch.cat([first.logits, second.logits]),
        first.cache,
    )
