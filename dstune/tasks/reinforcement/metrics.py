"""Metrics of rollouts, under the names that TRL gives them."""

from __future__ import annotations

from collections.abc import Mapping


def reinforcement_metrics(sums: Mapping[str, float]) -> dict[str, float]:
    """The metrics of a step or an evaluation. sums: of `rollout.rollout_sums`, and in training those of `PolicyHead`."""
    completions, rewarded = sums["completions"], sums["rewarded"]
    ended, tokens = sums["ended"], sums["length_sum"]
    metrics = {
        "reward": _ratio(sums["reward_sum"], rewarded),
        "reward_std": _ratio(sums["reward_deviations"], sums["groups"]),
        "frac_reward_zero_std": _ratio(sums["equal_groups"], sums["groups"]),
        "completions/mean_length": _ratio(tokens, completions),
        "completions/min_length": sums["shortest"],
        "completions/max_length": sums["longest"],
        "completions/mean_terminated_length": _ratio(sums["ended_length_sum"], ended),
        "completions/clipped_ratio": 1 - _ratio(ended, completions),
        "entropy": _ratio(sums["entropy"], tokens),
    }
    if "tool_calls" in sums:
        metrics["tools/call_frequency"] = _ratio(sums["tool_calls"], completions)
        metrics["tools/failure_frequency"] = _ratio(sums["failed_tool_calls"], sums["tool_calls"])
    for name in (name for name in sums if name.startswith("rewards/") and name.endswith("/sum")):
        reward = name.removesuffix("/sum")
        count = sums[f"{reward}/count"]
        metrics[f"{reward}/mean"] = _ratio(sums[name], count)
        metrics[f"{reward}/std"] = (sums[f"{reward}/squares"] / (count - 1)) ** 0.5 if count > 1 else 0.0
        metrics[f"{reward}/failed"] = 1 - _ratio(count, completions)
    if "tokens" in sums:
        metrics |= {
            "clip_ratio/low_mean": _ratio(sums["clipped_low"], sums["tokens"]),
            "clip_ratio/high_mean": _ratio(sums["clipped_high"], sums["tokens"]),
            "kl": _ratio(sums["kl"], sums["tokens"]),
            "sampling/sampling_logp_difference/mean": _ratio(sums["absolute_difference"], sums["compared"]),
            "sampling/sampling_logp_difference/max": sums["largest_difference"],
        }
    return metrics


def _ratio(value: float, count: float) -> float:
    return value / count if count else 0.0
