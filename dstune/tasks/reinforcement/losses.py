"""Policy losses, computed from the log-probabilities of sampled tokens.

Everything here is a function of one micro-batch, except `denominator`: the count over the global batch that losses are divided by.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dstune.tasks.reinforcement.config import KlEstimator, PolicyLoss, ReinforcementConfig, RewardScale

EPSILON = 1e-4
"""Added to standard deviations of rewards before dividing by them, as in TRL."""

BY_COMPLETION = (PolicyLoss.grpo, PolicyLoss.gspo, PolicyLoss.rloo)
"""Losses that are a mean over completions."""
WHOLE_RATIO = (PolicyLoss.gspo, PolicyLoss.rloo)
"""Losses with one ratio for all tokens of a completion."""


@dataclass(frozen=True)
class PolicyLossOutput:
    loss_sum: Tensor
    """Scalar fp32 with a graph. Summed over the step's micro-batches and divided by its `denominator`, it is the loss."""
    clipped_low: Tensor
    """How many tokens had their ratio clipped from below, scalar."""
    clipped_high: Tensor
    kl: Tensor
    """Sum over tokens, scalar without a graph."""


def denominator(config: ReinforcementConfig, lengths: Sequence[int]) -> float:
    """Return the number that the loss sum of a step is divided by. lengths: trained tokens of each completion of the global batch
    that counts."""
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

    logps, old, reference: log-probabilities of the tokens under the model in training (fp32 [tokens] with a graph), under the model
    that sampled them, and, if there is a KL term, under the model that training started from; each [tokens].
    advantages [tokens]: of each token's completion. completion: number of each token's completion, int64 [tokens], below `count`.
    correction: a factor for each token [tokens], from `importance_factors`.

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
        # Every token gets the ratio of its completion; after the division by the length, the tokens' losses add up to one loss.
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
    """Return the importance ratio of each token: its probability under the model in training over that under the sampler, at most
    `cap` (truncated importance sampling, Yao et al. 2025).

    old, sampled: log-probabilities under these two models [tokens]. masked: return 0 for tokens whose ratio is above `cap` or below
    1 / `cap` (as IcePop, Ling Team 2025, arXiv:2510.18855).
    """
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
    """Return the advantages, float64 [prompts, samples]. rewards: the same shape; NaN if no reward could be computed. Such a
    completion gets the advantage 0 and does not affect the others."""
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
