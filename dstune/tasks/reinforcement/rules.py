"""Rules of task=reinforcement."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from dstune.config.convert import format_value
from dstune.config.schema import Automatic, RunConfig
from dstune.core.errors import Problem
from dstune.protocols import REWARDS, method_of
from dstune.tasks.reinforcement.config import PolicyLoss, ReinforcementConfig


def check(config: RunConfig, task: ReinforcementConfig) -> Iterator[Problem]:
    yield from _check_rewards(task)
    if task.kl.coefficient:
        if not method_of(config.method).starts_at_base:
            yield Problem(
                "task.kl.coefficient",
                f"the reference is the model with its new adapter switched off, and method={config.method.name} trains none",
                "method=lora, or task.kl.coefficient=0",
                format_value(task.kl.coefficient),
            )
        if task.loss is PolicyLoss.rloo:
            yield Problem(
                "task.kl.coefficient",
                "task.loss=rloo has its KL term inside of the reward, which is not computed here",
                "another task.loss, or task.kl.coefficient=0",
                format_value(task.kl.coefficient),
            )
    if task.updates == 1:
        for key in ("clip_low", "clip_high"):
            if (value := getattr(task, key)) is not None:
                reason = "with one update for each rollout every ratio is 1, and nothing is clipped"
                yield Problem(f"task.{key}", reason, "task.updates=2 or more, or leave it out", format_value(value))
    if task.loss is PolicyLoss.cispo and task.clip_low is not None:
        yield Problem(
            "task.clip_low", "task.loss=cispo has no lower bound", "leave it out", format_value(task.clip_low)
        )
    if config.data.streaming:
        reason = "completions are told apart by the number of their prompt, which rows of a stream do not have"
        yield Problem("data.streaming", reason, "data.streaming=false", "true")
    if isinstance(config.trainer.micro_batch_size, Automatic):
        reason = "it is measured with rows as they are, before the model has answered any prompt"
        yield Problem("trainer.micro_batch_size", reason, "trainer.micro_batch_size=8, or as many as fit", "auto")
    if (dropout := getattr(config.method, "dropout", 0.0)) > 0:
        reason = "the model that samples has no dropout, and would not be the one that trains"
        yield Problem("method.dropout", reason, "method.dropout=0", format_value(dropout))
    if task.replay is not None and not Path(task.replay).is_dir():
        reason = "there is no such folder"
        yield Problem("task.replay", reason, "task.replay=RUN/rollouts of a run", format_value(task.replay))


def _check_rewards(task: ReinforcementConfig) -> Iterator[Problem]:
    if not task.rewards:
        choices = ", ".join(REWARDS)
        reason = "nothing scores the completions"
        yield Problem("task.rewards", reason, f"task.rewards=[NAME], one or more of {choices}, or a plugin's", "[]")
    for name in task.rewards:
        if name not in REWARDS:
            reason = "there is no such reward"
            yield Problem(
                "task.rewards", reason, f"one of {', '.join(REWARDS)}, or plugins=[FILE] that registers it", name
            )
    if len(set(task.rewards)) < len(task.rewards):
        yield Problem("task.rewards", "a reward is there twice", "name each once", format_value(list(task.rewards)))
    if task.reward_weights and len(task.reward_weights) != len(task.rewards):
        reason = f"task.rewards has {len(task.rewards)}"
        fix = "a factor for each, or leave it out"
        yield Problem("task.reward_weights", reason, fix, format_value(list(task.reward_weights)))
