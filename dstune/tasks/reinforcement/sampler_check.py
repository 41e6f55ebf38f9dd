"""Checks, by the log-probability of every sampled token, that the sampler is the model in training; if not, names the likeliest
cause."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dstune.core.errors import Problem
from dstune.models.heads.base import IGNORED, Batch, Forward
from dstune.tasks.reinforcement.config import Rollout
from dstune.tasks.reinforcement.head import PolicyHead

ALLOWED = {
    torch.float32: (math.inf, 1e-3, 1e-2),
    torch.bfloat16: (0.02, 0.1, 3.0),
    torch.float16: (0.02, 0.1, 3.0),
}
"""For each number format, how far the sampler's log-probabilities may be from those of the training forward pass: absolute value of
the mean difference, mean absolute difference, and largest absolute difference. Rounding alone gives 1.6e-5 at most and 2.5e-6 on
average in fp32, and 0.16 and 0.03 in bf16 (SmolLM2-135M, CPU). In bf16 the mean difference from rounding is near 0, while top-p 0.9
shifts it by 0.1."""

EXAMINED = 8
"""How many micro-batches are recomputed to find the cause of a difference."""
TEMPERATURES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.5, 2.0)
EXPLAINED = 0.35
"""A cause explains a difference if at most this share of the difference remains once the cause is accounted for."""

OTHER_WEIGHTS = "weights of an earlier step or of another model"
OTHER_PROMPT = "another prompt, as of another chat template or tokenizer"
LOST_ADAPTER = "a model without its adapter"
CUT_OFF = "a distribution that is cut off (top-p, top-k, min-p)"
PADDING = "padding on the left that is read, or counted in positions"


@dataclass(frozen=True)
class Difference:
    """Sampled tokens under the training forward pass and under the sampler."""

    tokens: Tensor
    """Log-probability in the training forward pass minus the sampler's, fp32 [tokens]."""
    places: Tensor
    """Position of each token in its completion, from 0, int64 [tokens]."""
    padded: Tensor
    """Whether the token's prompt is shorter than the longest prompt of its batch, bool [tokens]."""
    by_cause: Mapping[str, Tensor] = field(default_factory=dict)
    """For each possible cause, what remains of `tokens` once it is accounted for, fp32 [tokens]."""


def allowed(dtype: torch.dtype) -> tuple[float, float, float]:
    return ALLOWED.get(dtype, ALLOWED[torch.bfloat16])


def is_allowed(dtype: torch.dtype, signed: float, absolute: float, largest: float) -> bool:
    """Return whether all three differences are within `ALLOWED`. NaN is not."""
    limits = zip((abs(signed), absolute, largest), allowed(dtype), strict=True)
    return all(value <= limit for value, limit in limits)


def problem_of(
    rollout: Rollout, dtype: torch.dtype, step: int, measured: tuple[float, float, float], looks: str
) -> Problem:
    """Build the error message. measured: the differences in the order of `ALLOWED`. looks: the result of `looks_like`."""
    signed, absolute, largest = measured
    limits = allowed(dtype)
    reason = (
        f"at step {step} the sampler's log-probabilities differ from those of the training forward pass by {absolute:.3g} on "
        f"average ({signed:+.3g} with their sign) and {largest:.3g} at most; {str(dtype).removeprefix('torch.')} explains "
        f"{limits[1]:g} and {limits[2]:g}. It looks like {looks}"
    )
    fix = "the sampler is not the model that trains: "
    if rollout is Rollout.vllm:
        fix += (
            "vllm serve with the base and --dtype of this run, --logprobs-mode processed_logprobs, and nobody else who changes its "
            "weights"
        )
    else:
        fix += (
            "positions of padding, weights that changed between, or a model whose cached decoding differs (method=lora without "
            "dropout, model.attention=sdpa or eager)"
        )
    return Problem("task", reason, fix, "reinforcement")


def looks_like(difference: Difference, temperature: float, limit: float) -> str:
    """Name the likeliest cause. limit: the allowed mean absolute difference."""
    size = _size(difference.tokens)
    if not math.isfinite(size):
        return "a model whose log-probabilities are not finite"
    remaining = {cause: _size(values) for cause, values in difference.by_cause.items()}
    if remaining and min(remaining.values()) <= EXPLAINED * size:
        cause = min(remaining, key=lambda name: remaining[name])
        return f"{cause} (task.temperature={temperature:g})" if cause.startswith("temperature") else cause
    # If a part of the distribution is cut off, the sampler makes every remaining token more probable.
    noise = max(limit / 10, 1e-4)
    if float((difference.tokens <= noise).double().mean()) >= 0.995:
        return CUT_OFF
    padded, alone = difference.tokens[difference.padded], difference.tokens[~difference.padded]
    if len(padded) and len(alone) and _size(alone) <= EXPLAINED * _size(padded):
        return PADDING
    half = difference.places.double().median()
    early, late = difference.tokens[difference.places <= half / 2], difference.tokens[difference.places > half]
    if len(early) and len(late) and _size(early) > 2 * _size(late):
        return OTHER_PROMPT
    return f"{OTHER_WEIGHTS}, or {OTHER_PROMPT}"


def _size(values: Tensor) -> float:
    return float(values.abs().mean()) if len(values) else 0.0


def examine(head: PolicyHead, forward: Forward, batches: Sequence[Batch], temperature: float) -> Difference:
    """Compute the differences over the first `EXAMINED` of `batches` (see `PolicyHead`), plain and with each possible cause
    accounted for. Every rank must call it with the same number of batches."""
    tokens, places, padded = [], [], []
    by_cause: dict[str, list[Tensor]] = {}
    with torch.no_grad():
        for batch in batches[:EXAMINED]:
            targets = head.targets_of(batch)
            tokens.append(head.log_probabilities(forward, targets) - targets.sampled)
            if head.has_adapter:
                with head.without_adapter():
                    values = head.log_probabilities(forward, targets) - targets.sampled
                by_cause.setdefault(LOST_ADAPTER, []).append(values)
            for other in TEMPERATURES:
                if other != temperature:
                    with head.at_temperature(other):
                        values = head.log_probabilities(forward, targets) - targets.sampled
                    by_cause.setdefault(f"temperature {other:g}", []).append(values)
            # Targets are sorted by completion, so this is the index of each completion's first target.
            first = torch.searchsorted(targets.completion, targets.completion)
            places.append(torch.arange(len(first), device=first.device) - first)
            lengths = _prompt_lengths(batch)
            padded.append((lengths < lengths.max())[targets.completion])
    remaining = {cause: torch.cat(values) for cause, values in by_cause.items()}
    return Difference(torch.cat(tokens), torch.cat(places), torch.cat(padded), remaining)


def _prompt_lengths(batch: Batch) -> Tensor:
    """Return the tokens of each completion's prompt, int64 [completions]."""
    if "prompt_lengths" in batch:
        return batch["prompt_lengths"].repeat_interleave(batch["prompt_samples"])
    return (batch["labels"] != IGNORED).int().argmax(dim=1)
