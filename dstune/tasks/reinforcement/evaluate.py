"""Evaluates the rewards on held-out prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from dstune.data.batches import batch_of
from dstune.data.prepared import Split
from dstune.data.sampler import padded_batches, share
from dstune.data.stopping import stop_token_ids
from dstune.tasks.reinforcement.config import ReinforcementConfig
from dstune.tasks.reinforcement.head import PolicyHead
from dstune.tasks.reinforcement.metrics import reinforcement_metrics, rollout_sums
from dstune.tasks.reinforcement.records import Scored
from dstune.tasks.reinforcement.rollout import SEED_OF_EVALUATION, Rollouts
from dstune.trainer.evaluate import Evaluator
from dstune.trainer.measure import Evaluation


def evaluate_rewards(
    evaluator: Evaluator, task: ReinforcementConfig, split: Split, progress: Callable[[int, int], None] | None
) -> Evaluation:
    """Return the rewards of one sampled completion for each prompt of `split`. Sampling is as in training; its random numbers are
    different from training's, and the same in every evaluation."""
    config, world = evaluator.config, evaluator.world
    assert isinstance(evaluator.head, PolicyHead)
    stops = stop_token_ids(evaluator.tokenizer, task.chat_template_kwargs)
    rollouts = Rollouts(config, split, evaluator.engine, evaluator.head, evaluator.tokenizer, world, None, stops)
    batches = padded_batches(split.lengths, config)
    local_batches = share(batches, world.data_parallel_rank, world.data_parallel_size)
    pad = evaluator.tokenizer.pad_token_id
    groups: list[list[Scored]] = []
    try:
        for number, micro_batch in enumerate(local_batches):
            prompts = [(micro_batch, batch_of(config, split, micro_batch, pad))]
            completed = rollouts.complete(prompts, SEED_OF_EVALUATION, samples=1)
            rollouts.score(completed, evaluator.trainer_state())
            if not micro_batch.filler:
                groups += [[scored] for scored in completed[0]]
            if progress:
                progress(number + 1, len(local_batches))
    finally:
        rollouts.close()
    everyone = [row for rank in world.gather([_as_row(group[0]) for group in groups]) for row in rank]
    merged = [[_from_row(row)] for row in sorted(everyone, key=lambda row: int(row["prompt"]))]
    metrics = reinforcement_metrics(rollout_sums(task, merged))
    for name in ("reward_std", "frac_reward_zero_std"):
        del metrics[name]  # undefined for a single completion per prompt
    return scored_evaluation(metrics, [group[0] for group in merged])


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

    completion = Completion(row["prompt"], 0, [0] * row["length"], [], row["entropy"], row["ended"])
    calls = {"calls": row["calls"], "failed_calls": row["failed_calls"]}
    return Scored(completion, "", row["scores"], failures=row["failures"], **calls)
