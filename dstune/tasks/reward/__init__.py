"""task=reward: a score for an answer, learnt from pairs of a better and a worse one."""

from __future__ import annotations

from dstune.config.task_schema import RewardConfig
from dstune.protocols import Task, task


@task
class Reward(Task):
    Config = RewardConfig
    config: RewardConfig

    conversational = True
    has_head = True
    unpoolable = "a reward model has the head of its architecture"
    row_loss = False
    prefix_positions_ok = True
    unpackable = "answers are compared whole, each in a row of its own"
    predicts_from_text = False
    texts_per_row = 2
    output = "classifier"
    formats = ("preference",)
    frozen_keys = ("template_date",)
    metrics = ("loss", "reward_accuracy", "reward_margin")
