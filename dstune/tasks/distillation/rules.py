"""Rules of task=distillation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from dstune.config.convert import format_value
from dstune.config.multi_task import tasks_of
from dstune.config.schema import Automatic, RunConfig
from dstune.core.errors import Problem
from dstune.protocols import method_of, parallelism_of
from dstune.tasks.distillation.config import DistillationConfig

TEACHERS = "task.teacher=FOLDER, a hub id, a sample or the directory of a run"


def check(config: RunConfig, task: DistillationConfig) -> Iterator[Problem]:
    if task.teacher is None:
        yield from _check_base_as_teacher(config, task)
    elif not task.teacher.strip():
        yield Problem("task.teacher", "this is empty", TEACHERS, "''")
    elif (Path(task.teacher) / "adapter_config.json").is_file():
        reason = "this is an adapter, and a teacher is a whole model"
        fix = "dstune export RUN --merge of its run, and the merged model as task.teacher"
        yield Problem("task.teacher", reason, fix, format_value(task.teacher))
    if task.teacher_revision is not None and task.teacher is None:
        reason = "no teacher is given"
        fix = "task.teacher=ORG/MODEL, or leave it out"
        yield Problem("task.teacher_revision", reason, fix, format_value(task.teacher_revision))
    if task.text_weight == 1.0:
        reason = "nothing of the loss is left to the teacher"
        yield Problem(
            "task.text_weight", reason, "task.text_weight=0.5, or any value less than 1", format_value(task.text_weight)
        )
    yield from _check_own_answers(config, task)
    yield from _check_cache(config, task)
    if config.model.add_tokens:
        reason = "the teacher does not have these tokens"
        fix = "model.add_tokens=[], or a model and a teacher that have them"
        yield Problem("model.add_tokens", reason, fix, format_value(list(config.model.add_tokens)))
    if tasks_of(config):
        reason = "a teacher is asked about all rows, and those of other tasks have losses without one"
        yield Problem("data.mixture", reason, "sources without a task of their own", "")
    parallel = parallelism_of(config.parallel)
    if parallel.size > 1:
        reason = "the teacher reads whole rows, and computes them alone"
        yield Problem("parallel", reason, "parallel=none", parallel.name)


def _check_own_answers(config: RunConfig, task: DistillationConfig) -> Iterator[Problem]:
    default = DistillationConfig()
    if not task.on_policy:
        for key in ("max_new_tokens", "sampling_temperature"):
            if (value := getattr(task, key)) != getattr(default, key):
                reason = "no step samples answers of the model"
                yield Problem(f"task.{key}", reason, "task.on_policy=0.5, or leave it out", format_value(value))
        return
    if task.text_weight:
        reason = "the cross entropy of the model's own answers would only confirm them"
        yield Problem(
            "task.text_weight", reason, "task.text_weight=0, or task.on_policy=0", format_value(task.text_weight)
        )
    if task.train_on_prompt:
        reason = "the model answers prompts, so that only answers can count"
        yield Problem("task.train_on_prompt", reason, "task.train_on_prompt=false, or task.on_policy=0", "true")
    if config.data.streaming:
        reason = "answers are told apart by the number of their row, which rows of a stream do not have"
        yield Problem("data.streaming", reason, "data.streaming=false, or task.on_policy=0", "true")
    if isinstance(config.trainer.micro_batch_size, Automatic):
        reason = "it is measured with rows as they are, before the model has answered any prompt"
        yield Problem("trainer.micro_batch_size", reason, "trainer.micro_batch_size=8, or as many as fit", "auto")


def _check_cache(config: RunConfig, task: DistillationConfig) -> Iterator[Problem]:
    if not task.teacher_cache:
        return
    if task.teacher is None:
        reason = "no teacher is given, and the model with its adapter switched off is in memory anyway"
        yield Problem("task.teacher_cache", reason, f"task.teacher_cache=false, or {TEACHERS}", "true")
    if task.on_policy:
        reason = "the teacher has to read the model's own answers while they come"
        yield Problem("task.teacher_cache", reason, "task.teacher_cache=false, or task.on_policy=0", "true")
    if config.data.streaming:
        reason = "a stream has no rows that the teacher could read before training"
        yield Problem("data.streaming", reason, "data.streaming=false, or task.teacher_cache=false", "true")


def _check_base_as_teacher(config: RunConfig, task: DistillationConfig) -> Iterator[Problem]:
    """Yield what keeps the model, its adapter switched off, from being the teacher."""
    if not method_of(config.method).starts_at_base:
        reason = f"no teacher is given, and method={config.method.name} has no new adapter that could be switched off to teach"
        yield Problem("task.teacher", reason, TEACHERS, "null")
    elif not task.text_weight:
        reason = (
            "no teacher is given, and the model without its new adapter is where it starts: nothing is left to learn"
        )
        yield Problem(
            "task.teacher", reason, f"{TEACHERS}; or task.text_weight=0.5 to learn rows near the start", "null"
        )
