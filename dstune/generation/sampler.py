"""Chooses tokens. A token is the one with the largest p / e, where e is exponential noise: the race that samples from p exactly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dstune.generation.noise import exponential, mixed

BLOCK_ELEMENTS = 2**16
"""Logits that a CPU samples from at a time, so that intermediate values stay in its cache: noise for 8 rows of 49,152 tokens took
5.1 ms at once and 2.2 ms row by row."""
COLDEST = 1e-4
"""Below this temperature the most probable token is chosen: divided by less, logits would overflow fp32."""


def draw(logits: Tensor, temperature: float, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sample from the whole distribution. Return (token, its log-probability, entropy of the distribution), each [rows].

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
    token = _winner(logps, keys)
    logp = logps.gather(1, token[:, None])[:, 0]
    probabilities = logps.exp()
    entropy = -logps.clamp_(min=-1e9).mul_(probabilities).sum(dim=-1)
    return token, logp, entropy


def _winner(logps: Tensor, keys: Tensor) -> Tensor:
    """Draw a token for each row, int64 [rows]. logps: fp32 [rows, vocabulary]; keys: int64 [rows]."""
    # In place: with a large vocabulary what is written costs more than what is computed.
    return exponential(keys, logps.shape[-1]).log_().neg_().add_(logps).argmax(dim=-1)


@dataclass(frozen=True)
class Sampling:
    """The sampling settings of a request."""

    max_tokens: int
    temperature: float = 1.0
    """0 selects the most probable token."""
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    """From -2**63 to 2**63 - 1."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    """How many alternatives are reported for each token; None for no log-probabilities."""


@dataclass(frozen=True)
class Chosen:
    token: int
    logprob: float = 0.0
    """The model's own: before temperature, penalties and bias."""
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """Chooses the tokens of one answer. Equal seeds choose equal tokens, whatever else is in the batch."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int]):
        self.sampling = sampling
        self._key = torch.tensor([sampling.seed])
        self._prompt = torch.tensor(sorted(set(prompt)), dtype=torch.long)
        self._counts: dict[int, int] = {}
        self._position = 0

    def choose(self, logits: Tensor) -> Chosen:
        """Choose a token. logits: float [vocabulary] of the next token, on the CPU."""
        sampling = self.sampling
        penalized = self._with_penalties(logits)
        if sampling.temperature < COLDEST:
            token = int(penalized.argmax())
        else:
            logps = _with_top_k_top_p(penalized / sampling.temperature, sampling).log_softmax(-1)
            token = int(_winner(logps[None], mixed(self._key, self._position)))
        self._position += 1
        self._counts[token] = self._counts.get(token, 0) + 1
        if sampling.logprobs is None:
            return Chosen(token)
        logprobs = logits.log_softmax(-1)
        top: tuple[tuple[int, float], ...] = ()
        if sampling.logprobs:
            values, indices = logprobs.topk(min(sampling.logprobs, len(logprobs)))
            top = tuple(zip(indices.tolist(), values.tolist(), strict=True))
        return Chosen(token, float(logprobs[token]), top)

    def _with_penalties(self, logits: Tensor) -> Tensor:
        """Return `logits` with penalties and bias applied."""
        sampling = self.sampling
        generated = torch.tensor(list(self._counts), dtype=torch.long)
        if sampling.repetition_penalty != 1.0:  # Keskar et al. 2019
            context = torch.cat([self._prompt, generated]).unique()
            logits = logits.clone()
            values = logits[context]
            penalty = sampling.repetition_penalty
            logits[context] = torch.where(values > 0, values / penalty, values * penalty)
        if (sampling.presence_penalty or sampling.frequency_penalty) and len(generated):
            counts = torch.tensor(list(self._counts.values()), dtype=logits.dtype)
            logits = logits.clone()
            logits[generated] -= sampling.presence_penalty + sampling.frequency_penalty * counts
        if sampling.logit_bias:
            logits = logits.clone()
            tokens = torch.tensor(list(sampling.logit_bias), dtype=torch.long)
            logits[tokens] += torch.tensor(list(sampling.logit_bias.values()), dtype=logits.dtype)
        return logits


def _with_top_k_top_p(logits: Tensor, sampling: Sampling) -> Tensor:
    """Return `logits` with minus infinity for the tokens that top-k, top-p and min-p exclude; the most probable token always
    stays."""
    if 0 < sampling.top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(sampling.top_k).values[-1], -torch.inf)
    if sampling.min_p > 0:
        probabilities = logits.softmax(-1)
        logits = logits.masked_fill(probabilities < sampling.min_p * probabilities.max(), -torch.inf)
    if sampling.top_p < 1:
        ordered, order = logits.sort(descending=True)
        mass_before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        logits = logits.index_fill(0, order[mass_before >= sampling.top_p], -torch.inf)
    return logits
