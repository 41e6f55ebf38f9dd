"""Evaluates the rewards on held-out prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from dstune.data.batches import batch_of
from dstune.data.prepared import Split
from dstune.data.sampler import padded_batches, share
from dstune.data.stopping import stop_token_ids
from dstune.grading.paired import bootstrap_means, interval
from dstune.tasks.reinforcement.config import ReinforcementConfig
from dstune.tasks.reinforcement.head import PolicyHead
from dstune.tasks.reinforcement.metrics import reinforcement_metrics, reward_of, rollout_sums
from dstune.tasks.reinforcement.records import Scored
from dstune.tasks.reinforcement.rollout import SEED_OF_EVALUATION, Rollouts
from dstune.trainer.evaluate import Evaluator
from dstune.trainer.measure import Evaluation


def evaluate_rewards(
    evaluator: Evaluator, task: ReinforcementConfig, split: Split, progress: Callable[[int, int], None] | None
) -> Evaluation:
    """Return the rewards of `task.evaluation_samples` completions of each prompt of `split`, and how often one of several is right.
    Sampling is as in training; its random numbers are different from training's, and the same in every evaluation."""
    config, world = evaluator.config, evaluator.world
    assert isinstance(evaluator.head, PolicyHead)
    stops = stop_token_ids(evaluator.tokenizer, task.chat_template_kwargs)
    rollouts = Rollouts(config, split, evaluator.engine, evaluator.head, evaluator.tokenizer, world, None, stops)
    samples = task.evaluation_samples
    batches = padded_batches(split.lengths, config, answers=samples)
    local_batches = share(batches, world.data_parallel_rank, world.data_parallel_size)
    pad = evaluator.tokenizer.pad_token_id
    groups: list[list[Scored]] = []
    try:
        for number, micro_batch in enumerate(local_batches):
            prompts = [(micro_batch, batch_of(config, split, micro_batch, pad))]
            completed = rollouts.complete(prompts, SEED_OF_EVALUATION, samples=samples)
            rollouts.score(completed, evaluator.trainer_state())
            if not micro_batch.filler:
                groups += [completed[0][start : start + samples] for start in range(0, len(completed[0]), samples)]
            if progress:
                progress(number + 1, len(local_batches))
    finally:
        rollouts.close()
    packed = [[_as_row(scored) for scored in group] for group in groups]
    everyone = [group for of_rank in world.gather_groups(packed) for group in of_rank]
    everyone.sort(key=lambda group: int(group[0]["prompt"]))
    merged = [[_from_row(row) for row in group] for group in everyone]
    metrics = reinforcement_metrics(rollout_sums(replace(task, redraws=0), merged))
    if samples == 1:
        for name in ("reward_std", "frac_reward_zero_std"):
            del metrics[name]  # undefined for a single completion per prompt
    evaluation = scored_evaluation(metrics, [scored for group in merged for scored in group])
    pass_rates = pass_at_k([passes(task, group) for group in merged], samples) if samples > 1 else {}
    missing = {name for name, value in pass_rates.items() if math.isnan(value)}
    known = {name: value for name, value in pass_rates.items() if name not in missing}
    return replace(evaluation, metrics=evaluation.metrics | known, missing=evaluation.missing | missing)


def passes(task: ReinforcementConfig, group: Sequence[Scored]) -> tuple[int, int]:
    """Return how many completions of a prompt are scored, and how many of them have a reward of at least `task.pass_reward`."""
    rewards = [reward_of(scored, task.weights_of_content) for scored in group]
    scored = [reward for reward in rewards if not math.isnan(reward)]
    return len(scored), sum(reward >= task.pass_reward for reward in scored)


def pass_at_k(counts: Sequence[tuple[int, int]], samples: int) -> dict[str, float]:
    """Return the probability that at least one of k completions is right, for k = 1, 2, 4, ... and `samples`, and the ends of its
    95% interval. NaN if no prompt has k scored completions.

    counts: for each prompt, its scored completions and the right ones. The estimate of a prompt is 1 - C(n - c, k) / C(n, k), which
    is unbiased (Chen et al. 2021, arXiv:2107.03374, equation 1); the interval is a bootstrap over prompts.
    """
    sizes = sorted({2**power for power in range(samples.bit_length()) if 2**power <= samples} | {samples})
    metrics = {}
    for size in sizes:
        each = np.array([1 - math.comb(n - c, size) / math.comb(n, size) for n, c in counts if n >= size])
        low, high = interval(bootstrap_means(each)) if len(each) else (math.nan, math.nan)
        metrics[f"pass_at_{size}"] = float(each.mean()) if len(each) else math.nan
        metrics |= {f"pass_at_{size}/low": low, f"pass_at_{size}/high": high}
    return metrics


def scored_evaluation(metrics: dict[str, float], completions: Sequence[Scored]) -> Evaluation:
    """Return the evaluation of `completions`, without the figures that no score supports; its warnings say what is missing."""
    failures = [": ".join(*list(scored.failures.items())[:1]) for scored in completions if scored.failures]
    warnings: tuple[str, ...] = ()
    if failures:
        left_out = f"{len(failures):,} of {len(completions):,} completions are left out of eval/reward"
        warnings = (f"{left_out}: a reward could not score them ({failures[0]})",)
    names = [
        name.removesuffix("/failed") for name in metrics if name.startswith("rewards/") and name.endswith("/failed")
    ]
    unscored = {f"{name}/{figure}" for name in names if f"{name}/mean" not in metrics for figure in ("mean", "std")}
    if all(scored.failures or not any(score is not None for score in scored.scores) for scored in completions):
        unscored.add("reward")
    kept = {name: value for name, value in metrics.items() if name not in unscored}
    return Evaluation(kept, warnings=warnings, missing=frozenset(unscored))


def _as_row(scored: Scored) -> dict[str, Any]:
    completion = scored.completion
    return {
        "prompt": completion.prompt,
        "sample": completion.sample,
        "length": len(completion.ids),
        "ended": completion.ended,
        "entropy": completion.entropy,
        "scores": list(scored.scores),
        "failures": scored.failures,
        "calls": scored.calls,
        "failed_calls": scored.failed_calls,
    }


def _from_row(row: dict[str, Any]) -> Scored:
    from dstune.generation.completions import Completion

    completion = Completion(row["prompt"], row["sample"], [0] * row["length"], [], row["entropy"], row["ended"])
    calls = {"calls": row["calls"], "failed_calls": row["failed_calls"]}
    return Scored(completion, "", row["scores"], failures=row["failures"], **calls)
