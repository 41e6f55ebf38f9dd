"""Rules of `task`: what the other keys may not say beside it, and what fits together among its own."""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterator

from dstune.config.convert import shown
from dstune.config.method_schema import ImportanceConfig, LoraConfig, LoraInit
from dstune.config.schema import Precision, RunConfig
from dstune.config.task_schema import (
    CONVERSATIONS,
    ClassificationConfig,
    EmbeddingConfig,
    PreferenceConfig,
    PreferenceLoss,
    Reference,
    Seq2SeqConfig,
    TagScheme,
    TokenClassificationConfig,
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
    if isinstance(task, Seq2SeqConfig) and task.prompt.count("{source}") != 1:
        reason = "the source has to have one place in the prompt"
        yield Problem("task.prompt", reason, "task.prompt='\"Translate: {source}\"'", shown(task.prompt))
    if isinstance(task, ClassificationConfig | TokenClassificationConfig) and task.labels:
        yield from _check_labels(
            task.labels, least=1 if isinstance(task, ClassificationConfig) and task.multi_label else 2
        )
    if isinstance(task, ClassificationConfig):
        yield from _check_classification(config, task)
    if isinstance(task, TokenClassificationConfig):
        yield from _check_tags(config, task)


def _check_labels(labels: list[str], *, least: int) -> Iterator[Problem]:
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        reason = f"given more than once: {', '.join(twice)}"
        yield Problem("task.labels", reason, "name each label once", shown(labels))
    if len(labels) < least:
        yield Problem("task.labels", "one label leaves nothing to decide", "name two or more", shown(labels))
    if not all(label.strip() for label in labels):
        yield Problem("task.labels", "a label is empty", "give each a name", shown(labels))


def _check_classification(config: RunConfig, task: ClassificationConfig) -> Iterator[Problem]:
    weighted = [
        (key, value) for key, value in (("class_weights", task.class_weights), ("balanced", task.balanced)) if value
    ]
    if task.regression:
        others = [
            ("multi_label", task.multi_label),
            ("labels", task.labels),
            ("focal_gamma", task.focal_gamma),
            *weighted,
        ]
        for key, value in others:
            if value:
                reason = "with task.regression the label is a number, and there are no classes"
                yield Problem(f"task.{key}", reason, f"leave out task.{key}, or task.regression=false", shown(value))
    elif task.multi_label:
        for key, value in weighted:
            reason = "with task.multi_label a row is of several classes, and has no weight of one of them"
            yield Problem(f"task.{key}", reason, f"leave out task.{key}", shown(value))
    if len(weighted) > 1:
        reason = "the weights are given by task.class_weights already"
        yield Problem("task.balanced", reason, "task.balanced=false, or leave out task.class_weights", "true")
    if task.balanced and config.data.streaming:
        reason = "how many rows of a stream each class has is not known before its end"
        yield Problem("task.balanced", reason, "task.class_weights={NAME: WEIGHT}", "true")
    for name, weight in task.class_weights.items():
        if not (math.isfinite(weight) and weight > 0):
            yield Problem(f"task.class_weights.{name}", "a weight is more than 0", "for example 2.0", shown(weight))
        if task.labels and name not in task.labels:
            reason = f"no such label: task.labels are {', '.join(task.labels)}"
            yield Problem(f"task.class_weights.{name}", reason, "use the names of task.labels", shown(weight))


def _check_tags(config: RunConfig, task: TokenClassificationConfig) -> Iterator[Problem]:
    if task.scheme is TagScheme.plain:
        if task.repair:
            reason = "only marks of entities can be repaired, and task.scheme=plain takes the tags as they are"
            yield Problem("task.repair", reason, "task.scheme=bio, or task.repair=false", "true")
        metric = config.trainer.early_stopping.metric
        if metric.startswith("entity_"):
            reason = "with task.scheme=plain there are no entities"
            yield Problem("trainer.early_stopping.metric", reason, "token_accuracy, f1_macro or loss", metric)


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
    method = config.method
    # Only an adapter that begins at zero can be switched off to have the model that training began with.
    if not isinstance(method, LoraConfig):
        return True
    return method.adapter is not None or method.init not in (LoraInit.default, LoraInit.gaussian)
