"""task=distillation: the model learns the next-token distributions of a teacher at every target."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from dstune.protocols import task
from dstune.protocols.task import FurtherModel, TaskConfig
from dstune.protocols.task_options import BuildsBatches, KeepsFurtherModels, NeedsReference, TrainsOnRollouts
from dstune.tasks.chat import Chat
from dstune.tasks.distillation import rules
from dstune.tasks.distillation.config import DistillationConfig

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedModel

    from dstune.config.schema import Precision, RunConfig
    from dstune.core.distributed import World
    from dstune.core.errors import Problem
    from dstune.data.prepared import PreparedData, Split
    from dstune.data.sampler import MicroBatch
    from dstune.data.tokenize.sample import Encoder
    from dstune.models.heads import Head, Rows
    from dstune.tasks.distillation.rollout import OwnAnswers
    from dstune.tasks.distillation.teacher import Teacher
    from dstune.trainer.measure import Evaluation, Row, Totals
    from dstune.zero.engine import Engine

TEXTS = ("text", "tokens")


@task
class Distillation(Chat, NeedsReference, KeepsFurtherModels, BuildsBatches, TrainsOnRollouts):
    Config = DistillationConfig
    config: DistillationConfig

    sees_images = False  # the teacher has to see them too
    row_loss = False
    tensor_parallel = False
    few_shot = False
    countable_flops = False  # passes of the teacher
    formats: ClassVar[tuple[str, ...]] = (*Chat.formats, *TEXTS)
    frozen_keys: ClassVar[tuple[str, ...]] = ("template_date", "teacher_revision")
    unrecorded: ClassVar[tuple[str, ...]] = ("teacher", "teacher_revision")  # a path of this machine, perhaps
    further_models = (FurtherModel("teacher", "teacher_revision"),)
    metrics: ClassVar[tuple[str, ...]] = ("loss", "text_loss", "perplexity", "token_accuracy", "bits_per_byte")

    def __init__(self, config: Any):
        super().__init__(config)
        self._teacher: Teacher | None = None
        # Without a separate teacher, the model itself computes each micro-batch twice.
        self.one_pass = config.teacher is not None

    @property
    def resident_models(self) -> tuple[FurtherModel, ...]:
        return () if self.config.teacher_cache else self.further_models

    @property
    def whole_batch_loss(self) -> bool:
        return True

    def check(self, run: RunConfig) -> Iterator[Problem]:
        return rules.check(run, self.config)

    def resolve(self, today: str) -> TaskConfig:
        """Return the configuration; a teacher that is a run directory is replaced by the run's export."""
        config = super().resolve(today)
        assert isinstance(config, DistillationConfig)
        folder = Path(config.teacher or "")
        if config.teacher and (folder / "run.yaml").is_file() and (folder / "export" / "config.json").is_file():
            return replace(config, teacher=str(folder / "export"))
        return config

    def row_key(self) -> dict[str, Any]:
        """Return the settings of `task=chat` that decide the samples; the settings of the loss do not change them."""
        names = ("train_on_prompt", "turns", "reasoning", "reasoning_marks", "chat_template_kwargs")
        return {"name": self.name, **{name: value for name, value in super().row_key().items() if name in names}}

    def encoder(
        self, tokenizer: Any, fmt: str, max_length: int, labels: tuple[str, ...], class_weights: tuple[float, ...]
    ) -> Encoder:
        from dstune.tasks.causal_lm.encode import DocumentEncoder, TokensEncoder

        if fmt in TEXTS:
            return TokensEncoder(tokenizer, max_length) if fmt == "tokens" else DocumentEncoder(tokenizer, max_length)
        return super().encoder(tokenizer, fmt, max_length, labels, class_weights)

    def before_loading(
        self, run: RunConfig, data: PreparedData, tokenizer: Any, world: World, precision: Precision
    ) -> PreparedData:
        from dstune.tasks.distillation.cached_teacher import with_cached_teacher
        from dstune.tasks.distillation.teacher import load_teacher

        if self.config.teacher_cache:
            data, self._teacher = with_cached_teacher(run, data, tokenizer, world, precision)
        elif self.config.teacher is not None:
            self._teacher = load_teacher(run, tokenizer, world, precision)
        return data

    def collate(
        self, run: RunConfig, split: Split, micro_batch: MicroBatch, pad_token_id: int, *, with_index: bool
    ) -> dict[str, np.ndarray] | None:
        from dstune.tasks.distillation.cached_teacher import batch_with_states

        if split.target_states is None:
            return None
        return batch_with_states(run, split, micro_batch, pad_token_id, with_index=with_index)

    def head(self, model: PreTrainedModel, rows: Rows | None = None) -> Head:
        from dstune.tasks.distillation.head import DistillationHead

        assert self._teacher is not None or self.config.teacher is None, "the teacher is loaded before the model"
        return DistillationHead(self.config, model, self._teacher, rows)

    @property
    def tokens_written_behind_rows(self) -> int:
        return self.config.max_new_tokens if self.config.on_policy else 0

    def rollouts(
        self,
        run: RunConfig,
        data: PreparedData,
        engine: Engine,
        head: Any,
        tokenizer: Any,
        world: World,
        run_dir: Path,
    ) -> OwnAnswers | None:
        from dstune.data.stopping import stop_token_ids
        from dstune.tasks.distillation.rollout import OwnAnswers

        if not self.config.on_policy:
            return None
        stops = stop_token_ids(tokenizer, self.config.chat_template_kwargs)
        return OwnAnswers(run, data.train, engine, tokenizer, world, run_dir, stops)

    def measure_step(self, totals: Totals) -> dict[str, float]:
        answers = totals.more.get("own_answers", 0.0)
        return {"completions/mean_length": totals.more["own_tokens"] / answers} if answers else {}

    def measure(self, labels: tuple[str, ...], split: Split, totals: Totals, outputs: Sequence[Row]) -> Evaluation:
        from dstune.tasks.distillation.metrics import distillation_metrics
        from dstune.trainer.measure import Evaluation

        return Evaluation(distillation_metrics(totals, int(split.column("bytes").sum())))

    def close(self) -> None:
        if self._teacher is not None:
            self._teacher.close()
            self._teacher = None
