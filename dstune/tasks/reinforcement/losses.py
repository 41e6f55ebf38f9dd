"""Policy losses, of the log-probabilities of sampled tokens.

Everything here is a function of one micro-batch; what it is divided by, a count over the global batch, is `denominator`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dstune.tasks.reinforcement.config import KlEstimator, PolicyLoss, ReinforcementConfig, RewardScale

EPSILON = 1e-4
"""Beside a standard deviation of rewards, as TRL adds it."""

BY_COMPLETION = (PolicyLoss.grpo, PolicyLoss.gspo, PolicyLoss.rloo)
"""Losses that are a mean over completions."""
WHOLE_RATIO = (PolicyLoss.gspo, PolicyLoss.rloo)
"""Losses with one ratio for all tokens of a completion."""


@dataclass(frozen=True)
class PolicyLossOutput:
    loss_sum: Tensor
    """Scalar fp32 with a graph; divided by `denominator` of the step, summed over its micro-batches, it is the loss."""
    clipped_low: Tensor
    """Tokens (completions, where the ratio is theirs) whose ratio was clipped from below, scalar."""
    clipped_high: Tensor
    kl: Tensor
    """Sum over tokens, scalar without a graph."""


def denominator(config: ReinforcementConfig, lengths: Sequence[int]) -> float:
    """Return what the losses of a step are divided by. lengths: trained tokens of each completion of the global batch, without
    those that do not count."""
    if config.loss in BY_COMPLETION:
        return float(len(lengths))
    if config.loss is PolicyLoss.dr_grpo:  # Liu et al. 2025, arXiv:2503.20783
        return float(len(lengths) * config.max_new_tokens)
    return float(sum(lengths))


def policy_loss(
    config: ReinforcementConfig,
    logps: Tensor,
    old: Tensor,
    advantages: Tensor,
    completion: Tensor,
    count: int,
    reference: Tensor | None = None,
    correction: Tensor | None = None,
) -> PolicyLossOutput:
    """Return the loss of the sampled tokens of a micro-batch.

    correction: a factor of each token, [tokens], of `importance_factors`.

    logps: log-probabilities by the model that trains, fp32 [tokens] with a graph; old: by the model that sampled; reference: by
    the model that training started from, where there is a KL term; each [tokens]. advantages: of the completion of each token;
    completion: its number, int64 [tokens], below `count`.

    dapo, grpo: Shao et al. 2024 (arXiv:2402.03300), equation 3, clipped as in PPO (Schulman et al. 2017, arXiv:1707.06347,
    equation 7). gspo: Zheng et al. 2025 (arXiv:2507.18071), equation 5. cispo: MiniMax-M1 (arXiv:2506.13585), equation 4. rloo:
    Ahmadian et al. 2024 (arXiv:2402.14740) with the clipped ratio of whole completions that TRL has.
    """
    low, high = config.clip
    lengths = logps.new_zeros(count).index_add(0, completion, torch.ones_like(logps))
    difference = logps - old
    if config.loss in WHOLE_RATIO:
        summed = logps.new_zeros(count).index_add(0, completion, difference)
        if config.loss is PolicyLoss.gspo:
            summed = summed / lengths.clamp(min=1)
        # Of each token the share of its completion: the sum over a completion's tokens is then the completion's loss.
        ratios = summed.exp()[completion]
    else:
        ratios = difference.exp()
    if config.loss is PolicyLoss.cispo:
        losses = -ratios.detach().clamp(max=high) * advantages * logps
    else:
        losses = -torch.minimum(ratios * advantages, ratios.clamp(1 - low, 1 + high) * advantages)
    if correction is not None:
        losses = losses * correction
    diverged = logps.new_zeros(())
    if reference is not None:
        tokens = divergence(config.kl.estimator, logps, reference)
        losses = losses + config.kl.coefficient * tokens
        diverged = tokens.detach().sum()
    if config.loss in BY_COMPLETION:
        losses = losses / lengths[completion]
    with torch.no_grad():
        below = (ratios < 1 - low) & (advantages < 0) if config.loss is not PolicyLoss.cispo else ratios < 0
        limit = high if config.loss is PolicyLoss.cispo else 1 + high
        above = (ratios > limit) & (advantages > 0)
    return PolicyLossOutput(losses.sum(), below.sum(), above.sum(), diverged)


def importance_factors(old: Tensor, sampled: Tensor, cap: float, *, masked: bool = False) -> Tensor:
    """Return how much more probable the model that trains makes each token than the sampler did, at most `cap` (Yao et al. 2025,
    truncated importance sampling). masked: 0 instead for tokens that are more than `cap` times more or less probable (as IcePop,
    Ling Team 2025, arXiv:2510.18855). old, sampled: log-probabilities, [tokens]."""
    ratios = (old - sampled).exp()
    if masked:
        return torch.where((ratios <= cap) & (ratios >= 1 / cap), ratios, 0.0)
    return ratios.clamp(max=cap)


def divergence(estimator: KlEstimator, logps: Tensor, reference: Tensor) -> Tensor:
    """Estimate a token's KL divergence from the reference, of any shape."""
    difference = logps - reference
    match estimator:
        case KlEstimator.k1:
            return difference
        case KlEstimator.k2:
            return difference.square() / 2
        case KlEstimator.k3:
            return torch.exp(-difference) - 1 + difference


def advantages_of(config: ReinforcementConfig, rewards: Tensor) -> Tensor:
    """Return advantages, float64 [prompts, samples]. rewards: the same shape; not a number where no reward could be computed,
    which gives the advantage 0 and no share in the others."""
    has_reward = ~rewards.isnan()
    count = has_reward.sum(dim=1, keepdim=True)
    values = torch.where(has_reward, rewards, 0.0)
    mean = values.sum(dim=1, keepdim=True) / count.clamp(min=1)
    if config.loss is PolicyLoss.rloo:  # minus the mean of the others, which is (R - mean) * n / (n - 1)
        advantages = (values - mean) * count / (count - 1).clamp(min=1)
    else:
        advantages = values - mean
    if config.scale is RewardScale.group:
        squared = torch.where(has_reward, (values - mean).square(), 0.0).sum(dim=1, keepdim=True)
        advantages = advantages / ((squared / (count - 1).clamp(min=1)).sqrt() + EPSILON)
    elif config.scale is RewardScale.batch:
        everything = rewards[has_reward]
        spread = everything.std() if len(everything) > 1 else torch.zeros((), dtype=rewards.dtype)
        advantages = advantages / (spread + EPSILON)
    return torch.where(has_reward, advantages, 0.0)
