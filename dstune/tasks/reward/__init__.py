"""task=reward: a score for an answer, learnt from pairs of a better and a worse one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dstune.core.errors import Problem, UserError
from dstune.protocols import Task, task
from dstune.tasks.reward.config import RewardConfig

if TYPE_CHECKING:
    import numpy as np
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from dstune.checkpoint.card import Export
    from dstune.config.schema import RunConfig
    from dstune.data.prepared import Split
    from dstune.data.sampler import MicroBatch
    from dstune.data.tokenize.sample import Encoder
    from dstune.inference.predictor import Predictor
    from dstune.models.heads import Head, Rows
    from dstune.trainer.measure import Evaluation, Row, Totals


@task
class Reward(Task):
    Config = RewardConfig
    config: RewardConfig

    serves = ("reward",)
    conversational = True
    has_head = True
    head_classes = "ForSequenceClassification"
    peft_type = "SEQ_CLS"
    pipeline = "text-classification"
    unpoolable = "a reward model has the head of its architecture"
    row_loss = False
    has_predictions = False
    prefix_positions_ok = True
    unpackable = "answers are compared whole, each in a row of its own"
    predicts_from_text = False
    texts_per_row = 2
    output = "classifier"
    formats = ("preference", "openai_preference")
    frozen_keys = ("template_date",)
    metrics = ("loss", "reward_accuracy", "reward_margin")

    def model_class(self, architecture: PretrainedConfig) -> Any:
        from transformers import AutoModelForSequenceClassification

        return AutoModelForSequenceClassification

    def architecture(
        self, architecture: PretrainedConfig, labels: tuple[str, ...], tokenizer: PreTrainedTokenizerBase
    ) -> None:
        super().architecture(architecture, ("reward",), tokenizer)
        architecture.problem_type = "regression"

    def from_architecture(self, run: RunConfig, architecture: PretrainedConfig) -> RunConfig:
        if architecture.num_labels != 1:
            reason = f"a reward model has one output, and this one has {architecture.num_labels}"
            raise UserError(Problem("MODEL", reason, "give a reward model, or train one", run.model.path))
        return run

    def usage(self, export: Export) -> list[str]:
        return [
            *export.loading("SequenceClassification", 1),
            'print(model(**tokenizer("A question with its answer, rendered.", return_tensors="pt")).logits[0, 0])',
        ]

    def head(self, model: PreTrainedModel, rows: Rows | None = None) -> Head:
        from dstune.tasks.reward.head import reward_head

        return reward_head

    def measure(self, labels: tuple[str, ...], split: Split, totals: Totals, outputs: Sequence[Row]) -> Evaluation:
        from dstune.tasks.reward.metrics import reward_metrics
        from dstune.trainer.measure import Evaluation

        return Evaluation(reward_metrics(totals.loss_sum, totals.weight, totals.correct, totals.more))

    def measure_step(self, totals: Totals) -> dict[str, float]:
        from dstune.tasks.reward.metrics import reward_metrics
        from dstune.trainer.measure import without_loss

        return without_loss(reward_metrics(totals.loss_sum, totals.weight, totals.correct, totals.more))

    def encoder(
        self, tokenizer: Any, fmt: str, max_length: int, labels: tuple[str, ...], class_weights: tuple[float, ...]
    ) -> Encoder:
        from dstune.tasks.reward.encode import RewardEncoder

        arguments = self.config.chat_template_kwargs
        return RewardEncoder(tokenizer, self.config.template_date, fmt, max_length, arguments=arguments)

    def collate(
        self, run: RunConfig, split: Split, micro_batch: MicroBatch, pad_token_id: int, *, with_index: bool
    ) -> dict[str, np.ndarray]:
        from dstune.data.batches import pair_batch

        return pair_batch(split, micro_batch, pad_token_id)

    def as_query(self, fields: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
        """Return the better answer of a pair."""
        from dstune.data.tokenize import conversation

        template_columns = {key: row[key] for key in ("tools", "chat_template_kwargs") if row.get(key)}
        return {"messages": conversation(dict(row)), **template_columns}

    def predictor(self) -> type[Predictor]:
        from dstune.tasks.reward.predict import RewardPredictor

        return RewardPredictor
