"""task=reinforcement: the model answers prompts, and rewards say which answers to make more probable."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dstune.protocols import REWARDS, method_of, task
from dstune.protocols.task_options import EvaluatesOtherwise, KeepsFurtherModels, NeedsReference
from dstune.tasks._language import WritingTask
from dstune.tasks.reinforcement import rows as rows
from dstune.tasks.reinforcement import rules
from dstune.tasks.reinforcement.config import ReinforcementConfig

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from transformers import PreTrainedModel

    from dstune.config.schema import Precision, RunConfig
    from dstune.core.distributed import World
    from dstune.core.errors import Problem
    from dstune.data.prepared import PreparedData, Split
    from dstune.data.sampler import MicroBatch
    from dstune.data.tokenize.sample import Encoder
    from dstune.models.heads import Head, Rows
    from dstune.protocols.task import TaskConfig
    from dstune.tasks.reinforcement.reference import StartModel
    from dstune.tasks.reinforcement.rollout import Rollouts
    from dstune.trainer.evaluate import Evaluator
    from dstune.trainer.measure import Evaluation, Totals
    from dstune.zero.engine import Engine


@task
class Reinforcement(WritingTask, NeedsReference, KeepsFurtherModels, EvaluatesOtherwise):
    Config = ReinforcementConfig
    config: ReinforcementConfig

    conversational = True
    row_loss = False
    has_predictions = False
    comparable_loss = False
    unpackable = "completions are compared whole, each in a row of its own"
    low_learning_rate = True
    unrecorded = ("replay",)
    token_targets = True
    countable_flops = False  # of completions that nobody has written yet
    formats = ("prompt",)
    frozen_keys = ("template_date",)
    metrics = ("reward",)

    def __init__(self, config: Any):
        super().__init__(config)
        self._reference: StartModel | None = None

    @property
    def tokens_written_behind_rows(self) -> int:
        return self.config.max_new_tokens

    @property
    def answers_per_row(self) -> int:
        return self.config.samples

    @property
    def needs_answer(self) -> bool:
        return False

    @property
    def whole_batch_loss(self) -> bool:
        return True

    def check(self, run: RunConfig) -> Iterator[Problem]:
        return rules.check(run, self.config)

    def preflight(self, run: RunConfig) -> Iterator[Problem]:
        return rules.check_machine(self.config)

    def row_key(self) -> dict[str, Any]:
        key = {"name": self.name, "chat_template_kwargs": self.config.chat_template_kwargs}
        checking = sorted(name for name in self.config.rewards if name in REWARDS and REWARDS[name].checks_rows)
        return key | ({"rewards": checking} if checking else {})

    def encoder(
        self, tokenizer: Any, fmt: str, max_length: int, labels: tuple[str, ...], class_weights: tuple[float, ...]
    ) -> Encoder:
        from dstune.tasks.reinforcement.encode import PromptEncoder

        arguments = self.config.chat_template_kwargs
        # Not `fmt`: a conversation needs a chat template, a prompt that is a text does not.
        return PromptEncoder(tokenizer, self.config.template_date, self.formats[0], max_length, arguments=arguments)

    def collate(
        self, run: RunConfig, split: Split, micro_batch: MicroBatch, pad_token_id: int, *, with_index: bool
    ) -> dict[str, np.ndarray]:
        from dstune.tasks.reinforcement.encode import prompt_batch

        return prompt_batch(split, micro_batch, pad_token_id)

    def keeps_start_model(self, run: RunConfig) -> bool:
        return bool(self.config.kl.coefficient) and not method_of(run.method).starts_at_base

    def before_loading(
        self, run: RunConfig, data: PreparedData, tokenizer: Any, world: World, precision: Precision
    ) -> PreparedData:
        from dstune.tasks.reinforcement.reference import load_start_model

        if self.keeps_start_model(run):
            self._reference = load_start_model(run, tokenizer, world, precision)
        return data

    def for_evaluation(self, run: RunConfig) -> TaskConfig:
        """Return the task without its reference, which rewards do not need."""
        return replace(self.config, kl=replace(self.config.kl, coefficient=0.0))

    def head(self, model: PreTrainedModel, rows: Rows | None = None) -> Head:
        from dstune.tasks.reinforcement.head import PolicyHead

        return PolicyHead(self.config, model, self._reference)

    def close(self) -> None:
        if self._reference is not None:
            self._reference.close()
            self._reference = None

    def rollouts(
        self,
        run: RunConfig,
        data: PreparedData,
        engine: Engine,
        head: Any,
        tokenizer: Any,
        world: World,
        run_dir: Path,
    ) -> Rollouts:
        from dstune.data.stopping import stop_token_ids
        from dstune.tasks.reinforcement.rollout import Rollouts

        stops = stop_token_ids(tokenizer, self.config.chat_template_kwargs)
        return Rollouts(run, data.train, engine, head, tokenizer, world, run_dir, stops)

    def evaluate(self, evaluator: Evaluator, split: Split, progress: Any) -> Evaluation:
        from dstune.tasks.reinforcement.evaluate import evaluate_rewards

        return evaluate_rewards(evaluator, self.config, split, progress)

    def measure_step(self, totals: Totals) -> dict[str, float]:
        from dstune.tasks.reinforcement.metrics import reinforcement_metrics

        return reinforcement_metrics(totals.more)
