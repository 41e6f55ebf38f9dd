"""Rules of task=preference."""

from __future__ import annotations

from collections.abc import Iterator

from dstune.config.convert import format_value
from dstune.config.schema import RunConfig
from dstune.core.errors import Problem
from dstune.protocols import method_of
from dstune.tasks.preference.config import PreferenceConfig, PreferenceLoss, Reference

ONE_LOSS_ONLY = {
    "label_smoothing": PreferenceLoss.dpo,
    "gamma": PreferenceLoss.simpo,
    "desirable_weight": PreferenceLoss.kto,
    "undesirable_weight": PreferenceLoss.kto,
}
"""Keys of `task=preference` that only one loss reads."""


def check(config: RunConfig, task: PreferenceConfig) -> Iterator[Problem]:
    default = PreferenceConfig()
    for key, loss in ONE_LOSS_ONLY.items():
        value = getattr(task, key)
        if value != getattr(default, key) and task.loss is not loss:
            reason = f"task.loss={task.loss.name} does not use it"
            yield Problem(f"task.{key}", reason, f"leave it out, or task.loss={loss.name}", format_value(value))
    if not task.compares:
        reason = f"task.loss={task.loss.name} compares with no reference model"
        if task.reference_model is not None:
            yield Problem(
                "task.reference_model", reason, "leave it out, or task.loss=dpo", format_value(task.reference_model)
            )
        if task.reference is not Reference.auto:
            yield Problem("task.reference", reason, "leave it out, or task.loss=dpo", task.reference.name)
    if task.reference_model is not None and not task.reference_model.strip():
        yield Problem("task.reference_model", "this is empty", "give a folder or hub id, or leave it out", "''")
    if task.reference_revision is not None and task.reference_model is None:
        fix = "task.reference_model=ORG/MODEL, or leave it out"
        yield Problem(
            "task.reference_revision", "no reference model is given", fix, format_value(task.reference_revision)
        )
    if config.data.streaming and caches_reference(config, task):
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
            format_value(config.trainer.global_batch_size),
        )


def caches_reference(config: RunConfig, task: PreferenceConfig) -> bool:
    """Return whether the reference's log-probabilities are computed before training, instead of by the model with its new
    adapter switched off."""
    if not task.compares:
        return False
    if task.reference is Reference.cached or task.reference_model is not None:
        return True
    return not method_of(config.method).starts_at_base
