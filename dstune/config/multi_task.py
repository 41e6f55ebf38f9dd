"""Several tasks in one run: a source of `data.mixture` may have its own task or its own prompt.

One language model answers all of them.
"""

from __future__ import annotations

from collections.abc import Iterator

from dstune.config.convert import format_value
from dstune.config.data_schema import SourceConfig
from dstune.config.schema import RunConfig
from dstune.core.errors import Problem
from dstune.protocols import TASKS, task_of
from dstune.protocols.task import TaskConfig

OTHER_PARTS = ("validation", "test", "guard", "ood")
SHARED_METRICS = ("loss", "perplexity", "token_accuracy")
"""Metrics that are computed over the held-out rows of all tasks together."""


def is_multi_task(config: RunConfig) -> bool:
    return any(source.task is not None or source.prompt is not None for source in config.data.mixture.values())


def name_of_task(config: RunConfig, source: SourceConfig) -> str:
    return config.task.name if source.task is None else source.task


def task_of_source(config: RunConfig, source: SourceConfig) -> TaskConfig:
    """Return the task configuration for the rows of `source`."""
    return TASKS[name_of_task(config, source)].for_source(config.task, source.prompt)


def tasks_of(config: RunConfig) -> dict[str, TaskConfig]:
    """Return the task configuration of each source by the source's name, in the order of `data.mixture`; empty for a run of one
    task."""
    if not is_multi_task(config):
        return {}
    return {name: task_of_source(config, source) for name, source in config.data.mixture.items()}


def check_multi_task(config: RunConfig) -> Iterator[Problem]:
    for name, source in config.data.mixture.items():
        yield from _check_prompt(config, name, source)
    if not is_multi_task(config):
        return
    task = task_of(config.task)
    if not (task.language and task.conversational):
        reason = "sources of several tasks need a conversational language model that writes every answer"
        fix = "task=chat or task=seq2seq; a label is a target too, and plain text is data.mixture.NAME.task=causal_lm"
        yield Problem("task", reason, fix, config.task.name)
    for part in OTHER_PARTS:
        if (value := getattr(config.data, part)) is not None:
            reason = "the run has several tasks, and nothing says which of them the rows of this file belong to"
            held_out = f" data.split.{part}=0.05, which holds out rows of every task"
            fix = f"data.{part}=null{held_out if part in ('validation', 'test') else ''}"
            yield Problem(f"data.{part}", reason, fix, format_value(value))
    evaluate = config.evaluate
    for key in ("slices", "counterfactual", "baseline_shots"):
        if value := getattr(evaluate, key):
            reason = "this measures the rows of a single task, and the run has several, each with its own metrics"
            yield Problem(f"evaluate.{key}", reason, f"leave out evaluate.{key}", format_value(value))


def _check_prompt(config: RunConfig, name: str, source: SourceConfig) -> Iterator[Problem]:
    if source.prompt is None:
        return
    key = f"data.mixture.{name}.prompt"
    if not TASKS[name_of_task(config, source)].asks_by_prompt:
        task_name = next(task for task, cls in TASKS.classes().items() if cls.asks_by_prompt)
        yield Problem(
            key,
            "only tasks with source and target texts use a prompt",
            f"data.mixture.{name}.task={task_name}",
            source.prompt,
        )
    elif source.prompt.count("{source}") != 1:
        reason = "the prompt must contain {source} exactly once"
        yield Problem(key, reason, f"{key}='\"Translate: {{source}}\"'", format_value(source.prompt))
