"""Samples completions from the model that trains: bit-equal for the same weights, prompts and keys.

`sample_completions` computes a batch of prompts until all completions have ended, on several ranks in step if they have to.
`sample_continuously` keeps the batch full: when completions end, others take their place. The noise of both is the same function
of (keys, prompt, sample, position), so their tokens are the same except for rounding, since a row is computed beside others.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dstune.generation.batch import Batch, pad, read
from dstune.generation.noise import mixed
from dstune.generation.sampler import draw


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


@dataclass(frozen=True)
class Turn:
    """A completion to continue, with the tokens of its prompt and of the completion so far."""

    completion: Completion
    tokens: list[int]
    room: int
    """How many more tokens it may get."""


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
    completions = [Completion(prompt, sample) for prompt in prompts for sample in range(samples)]
    drawn = _continued(
        model,
        input_ids,
        attention_mask,
        _noise_keys(completions, keys, input_ids.device),
        samples=samples,
        limits=[max_new_tokens] * len(completions),
        temperature=temperature,
        ends=ends,
        padding=padding,
        goes_on=goes_on,
    )
    for completion, (ids, logps, entropy, ended) in zip(completions, drawn, strict=True):
        completion.ids, completion.logps, completion.entropy, completion.ended = ids, logps, entropy, ended
    return completions


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
    input_ids, attention_mask = pad([turn.tokens for turn in turns] or [[padding]], padding, device)
    drawn = _continued(
        model,
        input_ids,
        attention_mask,
        _noise_keys([turn.completion for turn in turns] or [Completion(0, 0)], keys, device),
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
    rows, device = len(input_ids) * samples, input_ids.device
    end_tokens = torch.tensor(sorted(ends), device=device)
    room = torch.tensor(limits, device=device)
    tokens_before = torch.tensor(list(positions_before) or [0] * rows, device=device)
    with torch.no_grad():
        batch, logits = read(model, input_ids, attention_mask)
        # The prompts are read once: their keys and values stand for all samples.
        batch.repeat(samples)
        logits = logits.repeat_interleave(samples, dim=0)
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
            logits = batch.step(token)
    drawn, drawn_logps = torch.stack(tokens, dim=1).tolist(), torch.stack(logps, dim=1).double().tolist()
    lengths = torch.stack(were_active, dim=1).sum(dim=1).tolist()
    sums = (torch.stack(entropies, dim=1) * torch.stack(were_active, dim=1)).sum(dim=1).tolist()
    has_ended = ended.tolist()
    return [
        (drawn[row][: lengths[row]], drawn_logps[row][: lengths[row]], sums[row], has_ended[row]) for row in range(rows)
    ]


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
    `samples` if that is more. The model must keep nothing but the keys and values of all tokens (`cache.layer_kinds`)."""
    waiting = deque(prompts)
    done: dict[tuple[int, int], Completion] = {}
    end_tokens = torch.tensor(sorted(ends), device=device)
    current: _Rows | None = None
    with torch.no_grad():
        while waiting or current is not None:
            room = rows if current is None else rows - len(current.completions)
            # A prompt may have more samples than there are rows.
            count = max(room // samples, 1 if current is None else 0)
            if entering := [waiting.popleft() for _ in range(min(len(waiting), count))]:
                new = _read_rows(model, entering, samples, padding, keys, device)
                if current is None:
                    current = new
                else:
                    current.join(new)
            assert current is not None
            token = current.draw(temperature, end_tokens)
            over = [c.ended or len(c.ids) >= max_new_tokens for c in current.completions]
            done |= {(c.prompt, c.sample): c for c, is_over in zip(current.completions, over, strict=True) if is_over}
            unfinished = [row for row, is_over in enumerate(over) if not is_over]
            if not unfinished:
                current = None
                continue
            if len(unfinished) < len(over):
                current.keep(unfinished)
                token = token[unfinished]
            current.logits = current.batch.step(token)
    return [done[number, sample] for number, _ in prompts for sample in range(samples)]


@dataclass
class _Rows:
    """The completions being generated, one per row."""

    completions: list[Completion]
    keys: Tensor
    """Keys of the noise, int64 [rows]."""
    batch: Batch
    logits: Tensor
    """Logits of the next token, [rows, vocabulary]."""

    def draw(self, temperature: float, end_tokens: Tensor) -> Tensor:
        """Draw the next token of each completion, and return them, int64 [rows]."""
        positions = torch.tensor([len(completion.ids) for completion in self.completions], device=self.keys.device)
        tokens, logps, entropies = draw(self.logits, temperature, mixed(self.keys, positions))
        drawn = zip(
            self.completions,
            tokens.tolist(),
            logps.double().tolist(),
            entropies.tolist(),
            torch.isin(tokens, end_tokens).tolist(),
            strict=True,
        )
        for completion, token, logp, entropy, has_ended in drawn:
            completion.ids.append(token)
            completion.logps.append(logp)
            completion.entropy += entropy
            completion.ended = has_ended
        return tokens

    def keep(self, rows: list[int]) -> None:
        self.completions = [self.completions[row] for row in rows]
        self.keys = self.keys[rows]
        self.batch.keep(rows)

    def join(self, other: _Rows) -> None:
        """Append the rows of `other`, which must not be used afterwards."""
        self.completions += other.completions
        self.keys = torch.cat([self.keys, other.keys])
        self.logits = torch.cat([self.logits, other.logits])
        self.batch.join(other.batch)


def _read_rows(
    model: nn.Module,
    prompts: Sequence[tuple[int, Sequence[int]]],
    samples: int,
    padding: int,
    keys: tuple[int, int],
    device: torch.device,
) -> _Rows:
    """Return rows for `prompts`; each prompt is computed once for all its samples."""
    batch, logits = read(model, *pad([ids for _, ids in prompts], padding, device))
    batch.repeat(samples)
    completions = [Completion(number, sample) for number, _ in prompts for sample in range(samples)]
    noise_keys = _noise_keys(completions, keys, device)
    return _Rows(completions, noise_keys, batch, logits.repeat_interleave(samples, dim=0))


def _noise_keys(completions: Sequence[Completion], keys: tuple[int, int], device: torch.device) -> Tensor:
    """Return the noise's keys of completions, int64 [completions]."""
    numbers = torch.tensor([completion.prompt for completion in completions], device=device)
    samples = torch.tensor([completion.sample for completion in completions], device=device)
    return mixed(mixed(mixed(torch.full_like(numbers, keys[0]), keys[1]), numbers), samples)
