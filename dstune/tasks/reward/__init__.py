"""task=reward: a score for an answer, learnt from pairs of a better and a worse one."""

from __future__ import annotations

from dstune.config.task_schema import RewardConfig
from dstune.protocols import Task, task


@task
class Reward(Task):
    Config = RewardConfig
    config: RewardConfig
