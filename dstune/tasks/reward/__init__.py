"""task=reward: a score for an answer, learnt from pairs of a better and a worse one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dstune.config.task_schema import RewardConfig
from dstune.protocols import Task, task

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedModel

    from dstune.config.schema import RunConfig
    from dstune.data.prepared import Split
    from dstune.data.sampler import MicroBatch
    from dstune.data.tokenize.sample import Encoder
    from dstune.models.heads import Head, Rows
    from dstune.train.measure import Evaluation, Row, Totals


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

    def head(self, model: PreTrainedModel, rows: Rows | None = None) -> Head:
        from dstune.tasks.reward.head import reward_head

        return reward_head

    def measure(self, labels: tuple[str, ...], split: Split, totals: Totals, kept: Sequence[Row]) -> Evaluation:
        from dstune.tasks.reward.metrics import reward_metrics
        from dstune.train.measure import Evaluation

        return Evaluation(reward_metrics(totals.loss_sum, totals.weight, totals.correct, totals.more))

    def measure_step(self, totals: Totals) -> dict[str, float]:
        from dstune.tasks.reward.metrics import reward_metrics
        from dstune.train.measure import without_loss

        return without_loss(reward_metrics(totals.loss_sum, totals.weight, totals.correct, totals.more))

    def encoder(
        self, tokenizer: Any, fmt: str, max_length: int, labels: tuple[str, ...], class_weights: tuple[float, ...]
    ) -> Encoder:
        from dstune.tasks.reward.encode import RewardEncoder

        return RewardEncoder(tokenizer, self.config.template_date, fmt, max_length)

    def collate(
        self, run: RunConfig, split: Split, micro_batch: MicroBatch, pad_token_id: int, *, with_index: bool
    ) -> dict[str, np.ndarray]:
        from dstune.data.batches import pair_batch

        return pair_batch(split, micro_batch, pad_token_id)
