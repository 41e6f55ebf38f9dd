"""Computes the metrics of rollouts, under TRL's names."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from dstune.tasks.reinforcement.config import ReinforcementConfig
from dstune.tasks.reinforcement.records import Scored

LOGGED = "logged/"
"""Prefix of the metrics that rewards log with TRL's `log_metric`."""


def reinforcement_metrics(sums: Mapping[str, float]) -> dict[str, float]:
    """Return the metrics of a step or an evaluation. sums: from `rollout_sums`; in training, also those of `PolicyHead`."""
    completions, rewarded = sums["completions"], sums["rewarded"]
    ended, tokens = sums["ended"], sums["length_sum"]
    metrics = {
        **({"reward": sums["reward_sum"] / rewarded} if rewarded else {}),
        "reward_std": _ratio(sums["reward_deviations"], sums["groups"]),
        "frac_reward_zero_std": _ratio(sums["equal_groups"], sums["groups"]),
        "completions/mean_length": _ratio(tokens, completions),
        "completions/min_length": sums["shortest"],
        "completions/max_length": sums["longest"],
        "completions/mean_terminated_length": _ratio(sums["ended_length_sum"], ended),
        "completions/clipped_ratio": 1 - _ratio(ended, completions),
        "entropy": _ratio(sums["entropy"], tokens),
    }
    if "replaced_groups" in sums:
        trained = sums["groups"] - sums["replaced_groups"]
        metrics["redraws/replaced"] = _ratio(sums["replaced_groups"], sums["groups"])
        metrics["redraws/without_signal"] = _ratio(sums["trained_without_signal"], trained)
    if "tool_calls" in sums:
        metrics["tools/call_frequency"] = _ratio(sums["tool_calls"], completions)
        metrics["tools/failure_frequency"] = _ratio(sums["failed_tool_calls"], sums["tool_calls"])
    for name in (name for name in sums if name.startswith("rewards/") and name.endswith("/sum")):
        reward = name.removesuffix("/sum")
        count = sums[f"{reward}/count"]
        if count:
            metrics[f"{reward}/mean"] = sums[name] / count
            metrics[f"{reward}/std"] = (sums[f"{reward}/squares"] / (count - 1)) ** 0.5 if count > 1 else 0.0
        metrics[f"{reward}/failed"] = _ratio(sums[f"{reward}/failures"], completions)
    if "tokens" in sums:
        metrics |= {
            "clip_ratio/low_mean": _ratio(sums["clipped_low"], sums["tokens"]),
            "clip_ratio/high_mean": _ratio(sums["clipped_high"], sums["tokens"]),
            "kl": _ratio(sums["kl"], sums["tokens"]),
            "sampling/sampling_logp_difference/mean": _ratio(sums["absolute_difference"], sums["compared"]),
            "sampling/sampling_logp_difference/max": sums["largest_difference"],
        }
    metrics |= {name: value for name, value in sums.items() if name.startswith(LOGGED)}
    if "importance" in sums:
        metrics["sampling/importance_sampling_ratio/mean"] = _ratio(sums["importance"], sums["compared"])
    return metrics


def _ratio(value: float, count: float) -> float:
    return value / count if count else 0.0


def rollout_sums(task: ReinforcementConfig, groups: Sequence[Sequence[Scored]]) -> dict[str, float]:
    """Return the sums from which `reinforcement_metrics` computes the metrics of a rollout."""
    completions = [scored for group in groups for scored in group]
    lengths = [len(scored.completion.ids) for scored in completions]
    ended = [len(scored.completion.ids) for scored in completions if scored.completion.ended]
    rewards = [[reward_of(scored, task.weights) for scored in group] for group in groups]
    scored_rewards = [[reward for reward in group if reward == reward] for group in rewards]
    deviations = [_deviation(group) for group in scored_rewards]
    flat = [reward for group in scored_rewards for reward in group]
    sums = {
        "groups": float(len(groups)),
        "completions": float(len(completions)),
        "reward_sum": sum(flat),
        "rewarded": float(len(flat)),
        "reward_deviations": sum(deviations),
        "equal_groups": float(sum(len({*group}) < 2 for group in scored_rewards)),
        "length_sum": float(sum(lengths)),
        "shortest": float(min(lengths, default=0)),
        "longest": float(max(lengths, default=0)),
        "ended": float(len(ended)),
        "ended_length_sum": float(sum(ended)),
        "entropy": sum(scored.completion.entropy for scored in completions),
    }
    if task.redraws:
        replaced = [group[0].replaced for group in groups]
        trained = [group for group, is_replaced in zip(groups, replaced, strict=True) if not is_replaced]
        sums["replaced_groups"] = float(sum(replaced))
        sums["trained_without_signal"] = float(sum(lacks_signal(task, group) for group in trained))
    if task.environment is not None:
        sums["tool_calls"] = float(sum(scored.calls for scored in completions))
        sums["failed_tool_calls"] = float(sum(scored.failed_calls for scored in completions))
    for number, name in enumerate(task.reward_names):
        scores = [score for scored in completions if (score := scored.scores[number]) is not None]
        mean = sum(scores) / len(scores) if scores else 0.0
        sums |= {
            f"rewards/{name}/sum": sum(scores),
            f"rewards/{name}/count": float(len(scores)),
            f"rewards/{name}/squares": sum((score - mean) ** 2 for score in scores),
            f"rewards/{name}/failures": float(sum(name in scored.failures for scored in completions)),
        }
    return sums


def lacks_signal(task: ReinforcementConfig, group: Sequence[Scored]) -> bool:
    """Return whether all completions of a prompt that are scored have the same reward, without what only measures their length. A
    group of which a reward failed to score a completion is not judged."""
    rewards = {reward_of(scored, task.weights_of_content) for scored in group}
    return not any(scored.failures for scored in group) and len({reward for reward in rewards if reward == reward}) < 2


def reward_of(scored: Scored, weights: Sequence[float]) -> float:
    """Return the weighted sum of a completion's scores; NaN if no reward scored it, or if one failed, whose score is then missing
    from the sum that the completion is compared by."""
    weighted = [score * weight for score, weight in zip(scored.scores, weights, strict=True) if score is not None]
    return sum(weighted) if weighted and not scored.failures else math.nan


def _deviation(values: Sequence[float]) -> float:
    """Return the standard deviation of a sample; 0 for fewer than two values."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
