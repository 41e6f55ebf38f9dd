"""task=preference: two answers to a prompt, the better one first (with `kto` single answers, good or bad)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dstune.config.schema import InitialWeights, RunConfig
from dstune.core.errors import Problem, UserError
from dstune.protocols import method_of, task
from dstune.protocols.method_options import StartsFromAdapters
from dstune.protocols.task import FurtherModel, TaskConfig
from dstune.tasks._language import WritingTask
from dstune.tasks.preference import rows as rows
from dstune.tasks.preference import rules
from dstune.tasks.preference.config import PreferenceConfig

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedModel

    from dstune.config.schema import Precision, RunConfig
    from dstune.core.distributed import World
    from dstune.data.prepared import PreparedData, Split
    from dstune.data.sampler import MicroBatch
    from dstune.data.tokenize.sample import Encoder
    from dstune.models.heads import Head, Rows
    from dstune.trainer.measure import Evaluation, Row, Totals
    from dstune.zero.engine import Engine


@task
class Preference(WritingTask):
    Config = PreferenceConfig
    config: PreferenceConfig

    conversational = True
    sees_images = True
    row_loss = False
    has_predictions = False
    prefix_positions_ok = True
    unpackable = "answers are compared whole, each in a row of its own"
    low_learning_rate = True
    unrecorded = ("reference_model", "reference_revision")  # may be a path of this machine
    texts_per_row = 2
    token_targets = True
    countable_flops = False  # passes of the reference model
    formats = ("feedback", "feedback_messages", "preference", "openai_preference")
    frozen_keys = ("template_date", "reference_revision")
    further_models = (FurtherModel("reference_model", "reference_revision"),)
    metrics = ("loss", "reward_accuracy", "reward_margin")

    @property
    def read_formats(self) -> tuple[str, ...]:
        return self.formats if self.config.single else ("preference", "openai_preference")

    @property
    def whole_batch_loss(self) -> bool:
        return self.config.compares

    def head(self, model: PreTrainedModel, rows: Rows | None = None) -> Head:
        from dstune.tasks.preference.head import JudgedHead, PairHead

        return JudgedHead(self.config, model) if self.config.single else PairHead(self.config, model)

    def measure(self, labels: tuple[str, ...], split: Split, totals: Totals, outputs: Sequence[Row]) -> Evaluation:
        from dstune.tasks.preference.metrics import preference_metrics
        from dstune.trainer.measure import Evaluation

        return Evaluation(preference_metrics(totals.loss_sum, totals.weight, totals.correct, totals.more))

    def measure_step(self, totals: Totals) -> dict[str, float]:
        from dstune.tasks.preference.metrics import preference_metrics
        from dstune.trainer.measure import without_loss

        return without_loss(preference_metrics(totals.loss_sum, totals.weight, totals.correct, totals.more))

    def check(self, run: RunConfig) -> Iterator[Problem]:
        return rules.check(run, self.config)

    def caches_reference(self, run: RunConfig) -> bool:
        return rules.caches_reference(run, self.config)

    def row_key(self) -> dict[str, Any]:
        return {  # the settings of the loss do not change the samples
            "name": self.name,
            "single": self.config.single,
            "chat_template_kwargs": self.config.chat_template_kwargs,
        }

    def encoder(
        self, tokenizer: Any, fmt: str, max_length: int, labels: tuple[str, ...], class_weights: tuple[float, ...]
    ) -> Encoder:
        from dstune.data.tokenize.pairs import PairEncoder
        from dstune.tasks.preference.encode import JudgedEncoder

        encoder = JudgedEncoder if self.config.single else PairEncoder
        arguments = self.config.chat_template_kwargs
        return encoder(tokenizer, self.config.template_date, fmt, max_length, arguments=arguments)

    def collate(
        self, run: RunConfig, split: Split, micro_batch: MicroBatch, pad_token_id: int, *, with_index: bool
    ) -> dict[str, np.ndarray]:
        from dstune.data.batches import pair_batch
        from dstune.tasks.preference.encode import judged_batch

        if self.config.single:
            return judged_batch(split, micro_batch, pad_token_id, run.data.max_length)
        return pair_batch(split, micro_batch, pad_token_id)

    def before_loading(
        self, run: RunConfig, data: PreparedData, tokenizer: Any, world: World, precision: Precision
    ) -> PreparedData:
        if not self.config.compares or self.config.reference_model is None:
            return data
        from dstune.tasks.preference.reference import with_reference_model

        return with_reference_model(run, data, tokenizer, world, precision)

    def before_training(
        self,
        run: RunConfig,
        data: PreparedData,
        engine: Engine,
        head: Any,
        world: World,
        pad_token_id: int,
        precision: Precision,
    ) -> PreparedData:
        from dstune.tasks.preference.reference import with_reference

        return with_reference(run, data, engine, head, world, pad_token_id, precision)

    def for_evaluation(self, run: RunConfig) -> TaskConfig:
        """Return the configuration with the model that the run started from as the reference. Raises UserError if the run started
        from random weights or from an adapter."""
        task, model = self.config, run.model
        if not task.compares or task.reference_model is not None:
            return task
        if model.weights is InitialWeights.random:
            reason = (
                "the run began with random weights, which are nowhere to be found, and the rewards are relative to them"
            )
            raise UserError(Problem("task.reference_model", reason, "give another model as the reference"))
        method = method_of(run.method)
        if isinstance(method, StartsFromAdapters) and method.folders:
            reason = "the run began with another adapter, and the rewards are relative to the model with it"
            fix = "task.reference_model=FOLDER of that adapter's run, merged by dstune export RUN --merge"
            raise UserError(Problem("task.reference_model", reason, fix))
        return replace(task, reference_model=model.path, reference_revision=model.revision)

    def check_evaluation(self) -> None:
        if self.config.compares and self.config.reference_model is None:
            loss = self.config.loss.name
            reason = f"the rewards of task.loss={loss} are relative to the model that training began with"
            raise UserError(Problem("task.reference_model", reason, "task.reference_model=PATH of that model"))
