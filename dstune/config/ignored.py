"""Warns of settings on the command line that have no effect because of other settings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from dstune.config.examples import complete
from dstune.config.multi_task import tasks_of
from dstune.config.names import all_keys
from dstune.config.overrides import key_of
from dstune.config.schema import RunConfig, stage_of
from dstune.config.sweep_schema import Pruner, Sampler
from dstune.core.errors import Problem
from dstune.protocols import TRACKERS, schedule_of, task_of


def ignored_settings(config: RunConfig, overrides: Sequence[str], *, continues: bool = False) -> list[Problem]:
    """Return a problem for each of `overrides` (`KEY=VALUE`) that changes nothing, with the reason and what would make it count.

    Values in files are not judged: an experiment may hold settings for several uses. continues: whether the overrides are for a run
    that exists, whose other settings cannot be changed.
    """
    value_by_key = {key_of(text): text.partition("=")[2] for text in overrides}
    return [
        Problem(key, f"this has no effect: {reason}", "leave it out" if continues else fix, value)
        for key, (reason, fix) in dict(_without_effect(config)).items()
        for name, value in value_by_key.items()
        if (name == key or name.startswith(f"{key}.")) and key in all_keys()
    ]


def ignored_in_sweep(config: RunConfig, overrides: Sequence[str]) -> list[Problem]:
    """Return a problem for each setting of a sweep that its other settings make useless; none if the run is no sweep."""
    sweep = config.sweep.optuna
    if sweep is None:
        return []
    unused: dict[str, tuple[str, str]] = {}
    if sweep.pruner is Pruner.none:
        unused["sweep.min_steps"] = ("sweep.pruner is none", "sweep.pruner=asha")
    if sweep.pruner not in (Pruner.asha, Pruner.hyperband):
        unused["sweep.reduction_factor"] = (f"sweep.pruner is {sweep.pruner.name}", "sweep.pruner=asha")
    if sweep.pruner is Pruner.median and sweep.sampler is not Sampler.grid and sweep.trials <= sweep.startup_trials:
        reason = f"the first sweep.startup_trials={sweep.startup_trials} trials are never ended early, and there are {sweep.trials}"
        unused["sweep.pruner"] = (reason, f"sweep.startup_trials={max(1, sweep.trials // 3)}")
    elif sweep.pruner is Pruner.asha and sweep.sampler is not Sampler.grid and sweep.trials < sweep.reduction_factor:
        needed = f"sweep.reduction_factor={sweep.reduction_factor}"
        reason = f"it ends no trial before {needed} trials have reached the same step, and there are {sweep.trials}"
        unused["sweep.pruner"] = (reason, f"sweep.trials={4 * sweep.reduction_factor}")
    if sweep.sampler is Sampler.grid:
        unused["sweep.trials"] = ("sweep.sampler=grid tries every combination", "sweep.sampler=tpe")
    if sweep.storage is None:
        unused["sweep.study"] = ("without sweep.storage, the study has its own file", "sweep.storage=URL")
    value_by_key = {key_of(text): text.partition("=")[2] for text in overrides}
    return [
        Problem(key, f"this has no effect: {reason}", fix, value_by_key[key])
        for key, (reason, fix) in unused.items()
        if key in value_by_key
    ]


def _without_effect(config: RunConfig) -> Iterator[tuple[str, tuple[str, str]]]:
    """Yield (key, (reason, fix)) for every setting that other settings make useless, whether the user gave it or not."""
    data, trainer, zero = config.data, config.trainer, config.zero
    generates = task_of(config.task).generates
    if trainer.max_steps is not None:
        fix = "leave it out" if data.streaming else "trainer.max_steps=null"
        yield "trainer.epochs", (f"trainer.max_steps={trainer.max_steps} is the length", fix)
    yield from schedule_of(config.schedule).without_effect()
    for part in ("validation", "test"):
        if file := getattr(data, part):
            yield f"data.split.{part}", (f"data.{part}={file} gives the rows", f"leave out data.{part}")
    if not config.model.train_vision:
        yield "optimizer.vision_lr", ("the tower is frozen", "model.train_vision=true")
    if data.mixture and data.train:
        yield "data.train", ("data.mixture replaces it", "data.mixture={}")
    if not data.streaming:
        yield "data.stream_rows", ("data.streaming is off", complete("data.streaming=true"))
    augment = data.augment
    if not augment.synonyms:
        yield "data.augment.synonym_share", ("no synonyms are given", complete("data.augment.synonyms=FILE"))
    if not augment.models:
        for key in ("prompt", "temperature", "max_new_tokens"):
            yield f"data.augment.{key}", ("no model rewrites copies", complete("data.augment.models=[MODEL]"))
    if not augment.on:
        yield "data.augment.seed", ("no copies are made", complete("data.augment.copies=1"))
    if data.packing:
        yield "trainer.length_grouping", ("packed rows all have one length", "data.packing=false")
        yield "data.padding", ("packed rows are not padded", "data.packing=false")
    if data.order is not None:
        yield "trainer.length_grouping", (f"data.order={data.order} has the rows of each step", "leave data.order out")
    stage = stage_of(zero)
    if stage == 0:
        yield "zero.reduce_bucket_size", ("zero.stage is 0", "zero=stage1")
    if stage < 2:
        yield "zero.overlap_comm", (f"zero.stage is {zero.stage}", "zero=stage2")
    if stage < 3:
        yield "zero.param_persistence_threshold", (f"zero.stage is {zero.stage}", "zero=stage3")
    if config.model.chat_template is not None and not task_of(config.task).conversational:
        yield "model.chat_template", (f"task={config.task.name} renders no conversations", "task=chat")
    if config.model.prompt_template is not None and not task_of(config.task).conversational:
        yield "model.prompt_template", (f"task={config.task.name} renders no conversations", "task=chat")
    if not any(task_of(task).generation_metrics for task in (config.task, *tasks_of(config).values())):
        fix = "task=seq2seq" if generates else "leave it out"
        yield "evaluate.generate_rows", (f"task={config.task.name} generates no targets", fix)
    if not config.evaluate.samples:
        fix = "evaluate.samples=1" if generates else "leave it out"
        yield "evaluate.max_new_tokens", ("no prompts are answered", fix)
    if not config.evaluate.safety:
        fix = "evaluate.safety=true" if generates else "leave it out"
        yield "evaluate.canaries", ("safety is not evaluated during training", fix)
    for key in all_keys():
        if key.startswith("sweep."):
            yield key, ("this is a single run", "--multirun starts a sweep")
    for tracker in TRACKERS.classes().values():
        yield from tracker.without_effect(config.tracking)
