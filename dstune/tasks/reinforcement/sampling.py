"""Samples completions from the model that trains: bit-equal for the same weights, prompts and seed.

A token is the one with the largest p / e, where e is exponential noise (the race that samples from p exactly). The noise is a pure
function of (seed, step, prompt, sample, position, token): there is no state of a generator to save, and no two completions
share noise.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from dstune.models.shared_prompts import NAME as SHARED_PROMPTS
from dstune.models.spans import attention_problem

_ODD = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
"""Constants of SplitMix64 (Steele et al. 2014, doi:10.1145/2660193.2660195)."""
BLOCK_ELEMENTS = 2**16
"""Logits that a CPU samples from at a time, so that intermediate values stay in its cache: noise for 8 rows of 49,152 tokens took
5.1 ms at once and 2.2 ms row by row."""


@dataclass
class Completion:
    """A completion of a prompt."""

    prompt: int
    """Number of the prompt in its split."""
    sample: int
    """Which of the prompt's completions, from 0."""
    ids: list[int] = field(default_factory=list)
    """Its tokens, including the end token."""
    logps: list[float] = field(default_factory=list)
    """Log-probability of each token at the temperature of sampling, as the sampler computed it."""
    entropy: float = 0.0
    """Sum over the tokens, in nats; of a server's completion the estimate -sum(logps)."""
    ended: bool = False
    """Whether it has an end token, and was not cut at the limit."""
    prompt_ids: list[int] | None = None
    """The prompt's tokens if they differ from the row's, because an environment added to them."""
    read: list[int] = field(default_factory=list)
    """Indices in `ids` of tokens that the model did not generate but read: results of tools. Their `logps` are 0."""
    version: str = ""
    """Version of the weights that generated all its tokens, if a server did."""


def sample_completions(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    prompts: list[int],
    *,
    samples: int,
    max_new_tokens: int,
    temperature: float,
    ends: Collection[int],
    padding: int,
    keys: tuple[int, int],
    goes_on: Callable[[bool], bool],
) -> list[Completion]:
    """Return `samples` completions of each prompt, those of one prompt one after the other.

    input_ids, attention_mask: [prompts, sequence], padded on the left; prompts: their numbers. ends: tokens after which a
    completion ends. keys: of the noise, beside prompt, sample and position (the run's seed, and the step). goes_on: called with
    whether this rank has an unfinished completion; returns whether another token is computed: if ranks compute in step, as long
    as any of them needs one.
    """
    rows = len(prompts) * samples
    numbers = torch.tensor(prompts, device=input_ids.device).repeat_interleave(samples)
    copies = torch.arange(samples, device=input_ids.device).repeat(len(prompts))
    row_keys = mixed(mixed(mixed(torch.full_like(numbers, keys[0]), keys[1]), numbers), copies)
    completions = [Completion(prompt, sample) for prompt in prompts for sample in range(samples)]
    drawn = _continued(
        model,
        input_ids,
        attention_mask,
        row_keys,
        samples=samples,
        limits=[max_new_tokens] * rows,
        temperature=temperature,
        ends=ends,
        padding=padding,
        goes_on=goes_on,
    )
    for completion, (ids, logps, entropy, ended) in zip(completions, drawn, strict=True):
        completion.ids, completion.logps, completion.entropy, completion.ended = ids, logps, entropy, ended
    return completions


@dataclass(frozen=True)
class Turn:
    """A completion to continue, with the tokens of its prompt and of the completion so far."""

    completion: Completion
    tokens: list[int]
    room: int
    """How many more tokens it may get."""


def continue_completions(
    model: nn.Module,
    turns: Sequence[Turn],
    *,
    temperature: float,
    ends: Collection[int],
    padding: int,
    keys: tuple[int, int],
    goes_on: Callable[[bool], bool],
    device: torch.device,
) -> list[bool]:
    """Continue each completion to the end of its turn or to its limit; return whether each got an end token.

    The noise of a token depends on its position in the completion. Arguments as in `sample_completions`. Without any turn, this
    rank computes along with the others.
    """
    rows = [turn.tokens for turn in turns] or [[padding]]
    width = max(map(len, rows))
    ids = torch.tensor([[padding] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    numbers = torch.tensor([turn.completion.prompt for turn in turns] or [0], device=device)
    copies = torch.tensor([turn.completion.sample for turn in turns] or [0], device=device)
    row_keys = mixed(mixed(mixed(torch.full_like(numbers, keys[0]), keys[1]), numbers), copies)
    drawn = _continued(
        model,
        ids,
        mask,
        row_keys,
        samples=1,
        limits=[turn.room for turn in turns] or [0],
        temperature=temperature,
        ends=ends,
        padding=padding,
        goes_on=goes_on,
        positions_before=[len(turn.completion.ids) for turn in turns] or [0],
    )
    ended = []
    for turn, (new, logps, entropy, has_ended) in zip(turns, drawn, strict=False):
        turn.completion.ids += new
        turn.completion.logps += logps
        turn.completion.entropy += entropy
        ended.append(has_ended)
    return ended


Drawn = tuple[list[int], list[float], float, bool]
"""Tokens, their log-probabilities, the sum of entropies, and whether the last token is an end."""


def _continued(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    row_keys: Tensor,
    *,
    samples: int,
    limits: Sequence[int],
    temperature: float,
    ends: Collection[int],
    padding: int,
    goes_on: Callable[[bool], bool],
    positions_before: Sequence[int] = (),
) -> list[Drawn]:
    """Sample `samples` continuations of each row of `input_ids`.

    limits: the most tokens of each continuation. goes_on: decides whether another token is computed, from whether this rank has
    an unfinished continuation.
    """
    from transformers import DynamicCache

    rows, device = len(input_ids) * samples, input_ids.device
    end_tokens = torch.tensor(sorted(ends), device=device)
    room = torch.tensor(limits, device=device)
    tokens_before = torch.tensor(list(positions_before) or [0] * rows, device=device)
    with torch.no_grad():
        cache = DynamicCache(config=configuration_of(model))
        logits = last_logits(model, input_ids, attention_mask, positions_of(attention_mask), cache)
        # The prompts are read once: their keys and values stand for all samples.
        cache.batch_repeat_interleave(samples)
        logits = logits.repeat_interleave(samples, dim=0)
        mask = attention_mask.repeat_interleave(samples, dim=0)
        positions = positions_of(mask)[:, -1:]
        takes_ready_masks = _takes_ready_masks(model, cache)
        is_padded = not bool(attention_mask.all())
        active = room > 0
        ended = torch.zeros_like(active)
        tokens, logps, entropies, were_active = [], [], [], []
        for position in itertools.count():
            token, logp, entropy = draw(logits, temperature, mixed(row_keys, tokens_before + position))
            token = torch.where(active, token, padding)
            tokens.append(token)
            logps.append(logp)
            entropies.append(entropy)
            were_active.append(active)
            ended |= active & torch.isin(token, end_tokens)
            active = active & ~ended & (room > position + 1)
            if not goes_on(bool(active.any())):
                break
            mask = torch.cat([mask, mask.new_ones(rows, 1)], dim=1)
            positions = positions + 1
            step_mask: Tensor | None = mask
            if takes_ready_masks:
                step_mask = mask[:, None, None].bool() if is_padded else None
            logits = last_logits(model, token[:, None], step_mask, positions, cache)
    drawn, drawn_logps = torch.stack(tokens, dim=1).tolist(), torch.stack(logps, dim=1).double().tolist()
    lengths = torch.stack(were_active, dim=1).sum(dim=1).tolist()
    sums = (torch.stack(entropies, dim=1) * torch.stack(were_active, dim=1)).sum(dim=1).tolist()
    has_ended = ended.tolist()
    return [
        (drawn[row][: lengths[row]], drawn_logps[row][: lengths[row]], sums[row], has_ended[row]) for row in range(rows)
    ]


def draw(logits: Tensor, temperature: float, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (token, its log-probability, entropy of the distribution), each [rows].

    logits: [rows, vocabulary]; keys: int64 [rows], one for each draw.
    """
    rows = max(1, BLOCK_ELEMENTS // logits.shape[-1]) if logits.is_cpu else len(logits)
    blocks = [_draw(*block, temperature) for block in zip(logits.split(rows), keys.split(rows), strict=True)]
    if len(blocks) == 1:
        return blocks[0]
    token, logp, entropy = (torch.cat(parts) for parts in zip(*blocks, strict=True))
    return token, logp, entropy


def _draw(logits: Tensor, keys: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    logits = logits.float()
    logps = torch.log_softmax(logits if temperature == 1.0 else logits / temperature, dim=-1)
    # In place: with a large vocabulary what is written costs more than what is computed.
    token = exponential(keys, logits.shape[-1]).log_().neg_().add_(logps).argmax(dim=-1)
    logp = logps.gather(1, token[:, None])[:, 0]
    probabilities = logps.exp()
    entropy = -logps.clamp_(min=-1e9).mul_(probabilities).sum(dim=-1)
    return token, logp, entropy


def exponential(keys: Tensor, count: int) -> Tensor:
    """Draw exponential noise of mean 1, fp32 [rows, count]. keys: int64 [rows]."""
    bits = mixed(keys[:, None], torch.arange(count, device=keys.device)[None])
    # 53 bits, and a half of the last one, so that it is never 0.
    uniform = bits.bitwise_right_shift_(11).bitwise_and_(2**53 - 1).double().add_(0.5).mul_(2.0**-53)
    return uniform.log_().neg_().float()


def mixed(keys: Tensor, number: Tensor | int) -> Tensor:
    """Return keys of which any two that differ in `keys` or `number` are unrelated: SplitMix64's output function, int64."""
    golden, first, second = (odd - 2**64 if odd >= 2**63 else odd for odd in _ODD)
    value = (keys ^ _shifted(keys, 32)) * second + (torch.as_tensor(number, device=keys.device) + 1) * golden
    value.bitwise_xor_(_shifted(value, 30)).mul_(first)
    value.bitwise_xor_(_shifted(value, 27)).mul_(second)
    return value.bitwise_xor_(_shifted(value, 31))


def _shifted(value: Tensor, bits: int) -> Tensor:
    """Return a logical shift to the right of int64."""
    return (value >> bits).bitwise_and_(2 ** (64 - bits) - 1)


def configuration_of(model: Any) -> Any:
    """Return the configuration of the text model below adapters."""
    return model.config.get_text_config(decoder=True)


def positions_of(mask: Tensor) -> Tensor:
    """Return the position of each token in its row, not counting padding, [rows, sequence]."""
    return (mask.cumsum(dim=1) - 1).clamp(min=0)


def _takes_ready_masks(model: Any, cache: Any) -> bool:
    """Return whether the model accepts a mask of one token for all layers, [rows, 1, 1, tokens] or None. Otherwise it builds one
    from [rows, tokens] for every token."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    by_sdpa = base.config._attn_implementation in ("sdpa", SHARED_PROMPTS) and attention_problem(base) is None
    return by_sdpa and all(type(layer).__name__ == "DynamicLayer" for layer in cache.layers)


def last_logits(model: nn.Module, ids: Tensor, mask: Tensor | None, positions: Tensor, cache: Any) -> Tensor:
    """Return the logits of the token after the last one of each row, [rows, vocabulary]."""
    parameters = _parameters(model)
    keys_and_values = "cache" if "cache" in parameters else "past_key_values"  # of transformers before 5.24
    options = {keys_and_values: cache} | ({"logits_to_keep": 1} if "logits_to_keep" in parameters else {})
    output = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, **options)
    logits: Tensor = output.logits[:, -1]
    return logits


def _parameters(model: Any) -> frozenset[str]:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return _names_of_parameters(getattr(base.forward, "__func__", base.forward))


@lru_cache(maxsize=4)
def _names_of_parameters(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)
