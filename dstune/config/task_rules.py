"""Rules of `task`: what the other keys may not say beside it, and what fits together among its own."""

from __future__ import annotations

import datetime
from collections.abc import Iterator

from dstune.config.convert import shown
from dstune.config.method_schema import ImportanceConfig, LoraConfig
from dstune.config.schema import Precision, RunConfig
from dstune.config.task_schema import (
    CONVERSATIONS,
    ClassificationConfig,
    EmbeddingConfig,
    PreferenceConfig,
    PreferenceLoss,
    Reference,
)
from dstune.errors import Problem


def check_task(config: RunConfig) -> Iterator[Problem]:
    task = config.task
    if isinstance(task, CONVERSATIONS) and task.template_date is not None:
        try:
            valid = datetime.date.fromisoformat(task.template_date).isoformat() == task.template_date
        except ValueError:
            valid = False
        if not valid:
            yield Problem(
                "task.template_date",
                "this is no date",
                "write it as YYYY-MM-DD, or leave it out",
                shown(task.template_date),
            )
    if isinstance(task, PreferenceConfig):
        yield from _check_preference(config, task)
    if isinstance(task, EmbeddingConfig):
        yield from _check_embedding(config)
    if isinstance(task, EmbeddingConfig) or (isinstance(task, PreferenceConfig) and task.compares):
        yield from _check_scores(config)
    if isinstance(task, ClassificationConfig) and task.labels:
        twice = sorted({label for label in task.labels if task.labels.count(label) > 1})
        if twice:
            reason = f"given more than once: {', '.join(twice)}"
            yield Problem("task.labels", reason, "name each label once", shown(task.labels))
        if len(task.labels) < 2 and not task.multi_label:
            yield Problem("task.labels", "one label leaves nothing to decide", "name two or more", shown(task.labels))
        if not all(label.strip() for label in task.labels):
            yield Problem("task.labels", "a label is empty", "give each a name", shown(task.labels))


ONE_LOSS_ONLY = {
    "label_smoothing": PreferenceLoss.dpo,
    "gamma": PreferenceLoss.simpo,
    "desirable_weight": PreferenceLoss.kto,
    "undesirable_weight": PreferenceLoss.kto,
}
"""Keys of `task=preference` that a single loss reads."""


def _check_preference(config: RunConfig, task: PreferenceConfig) -> Iterator[Problem]:
    default = PreferenceConfig()
    for key, loss in ONE_LOSS_ONLY.items():
        value = getattr(task, key)
        if value != getattr(default, key) and task.loss is not loss:
            reason = f"task.loss={task.loss.name} does not use it"
            yield Problem(f"task.{key}", reason, f"leave it out, or task.loss={loss.name}", shown(value))
    if not task.compares:
        reason = f"task.loss={task.loss.name} compares with no reference model"
        if task.reference_model is not None:
            yield Problem("task.reference_model", reason, "leave it out, or task.loss=dpo", shown(task.reference_model))
        if task.reference is not Reference.auto:
            yield Problem("task.reference", reason, "leave it out, or task.loss=dpo", task.reference.name)
    if task.reference_model is not None and not task.reference_model.strip():
        yield Problem("task.reference_model", "this is empty", "give a folder or hub id, or leave it out", "''")
    if task.reference_revision is not None and task.reference_model is None:
        fix = "task.reference_model=ORG/MODEL, or leave it out"
        yield Problem("task.reference_revision", "no reference model is given", fix, shown(task.reference_revision))
    if config.data.streaming and cached_reference(config):
        yield Problem(
            "data.streaming",
            "the reference's log-probabilities are computed before training, and the rows of a stream are not there then",
            "data.streaming=false, or method=lora with task.reference=auto",
            "true",
        )
    if task.loss is PreferenceLoss.kto and config.trainer.global_batch_size < 2:
        yield Problem(
            "trainer.global_batch_size",
            "the KL estimate of task.loss=kto is a mean over the rows of a step",
            "8 or more",
            shown(config.trainer.global_batch_size),
        )


def _check_embedding(config: RunConfig) -> Iterator[Problem]:
    if config.trainer.global_batch_size < 2:
        yield Problem(
            "trainer.global_batch_size",
            "the other pairs of a step are what an anchor is told apart from, and there are none",
            "32 or more",
            shown(config.trainer.global_batch_size),
        )
    if config.trainer.precision is Precision.fp16:
        # The gradient of a vector goes into the second pass as a number of the loss, whose scale is found by overflows.
        yield Problem(
            "trainer.precision",
            "the loss of task=embedding is computed from vectors of two passes, which fp16's loss scale was not tried with",
            "trainer.precision=bf16",
            "fp16",
        )


def _check_scores(config: RunConfig) -> Iterator[Problem]:
    """Gradients at the start weights are looked at one micro-batch at a time, and without a reference model."""
    reason = (
        f"gradients of task={config.task.name} alone say nothing: its loss needs the whole step, or a reference model"
    )
    if isinstance(config.method, ImportanceConfig):
        yield Problem("method", reason, "method=full or method=lora", "importance")
    if config.forgetting.ewc:
        yield Problem("forgetting.ewc", reason, "forgetting.ewc=0, or forgetting.l2sp", shown(config.forgetting.ewc))


def cached_reference(config: RunConfig) -> bool:
    """Whether the reference's log-probabilities are computed before training, instead of by the model with its new
    adapter switched off."""
    task = config.task
    if not isinstance(task, PreferenceConfig) or not task.compares:
        return False
    if task.reference is Reference.cached or task.reference_model is not None:
        return True
    return not isinstance(config.method, LoraConfig)
