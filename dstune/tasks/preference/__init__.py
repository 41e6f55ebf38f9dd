"""task=preference: two answers to a prompt, the better one first (with `kto` single answers, good or bad)."""

from __future__ import annotations

from dstune.config.task_schema import PreferenceConfig
from dstune.protocols import Task, task
from dstune.protocols.task import FurtherModel


@task
class Preference(Task):
    Config = PreferenceConfig
    config: PreferenceConfig

    conversational = True
    generates = True
    row_loss = False
    prefix_positions_ok = True
    unpackable = "answers are compared whole, each in a row of its own"
    low_learning_rate = True
    texts_per_row = 2
    formats = ("feedback", "preference")
    frozen_keys = ("template_date", "reference_revision")
    further_models = (FurtherModel("reference_model", "reference_revision"),)
    metrics = ("loss", "reward_accuracy", "reward_margin")

    @property
    def read_formats(self) -> tuple[str, ...]:
        return self.formats if self.config.single else ("preference",)

    @property
    def whole_batch_loss(self) -> bool:
        return self.config.compares
