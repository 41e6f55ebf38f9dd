"""Rules of `sweep`: objectives, and what fits together among samplers, pruners and launches."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator

from dstune.config.cadence import first_evaluation
from dstune.config.convert import format_value
from dstune.config.schema import RunConfig
from dstune.config.sweep_schema import OptunaConfig, Pruner, Sampler
from dstune.core.errors import Problem
from dstune.protocols import launcher_of

LOWER_COSTS = ("seconds", "peak_memory_gib")
COSTS = (*LOWER_COSTS, "tokens_per_second")
"""Keys of result.json that may be objectives, in addition to the metrics of an evaluation."""
STORAGES = r"(sqlite|postgresql|mysql|mariadb|oracle|mssql)(\+\w+)?://|rediss?://|journal:."
SINGLE_OBJECTIVE_SAMPLERS = (Sampler.cmaes,)
"""Samplers that support only one objective."""


def objectives(config: RunConfig) -> list[str]:
    """Return the names of the metrics and costs that trials are compared by; the first one decides the order."""
    return list(config.sweep.objective) or [config.trainer.early_stopping.metric]


def holds_out(config: RunConfig) -> bool:
    """Return whether there are validation rows."""
    return bool(config.data.validation) or config.data.split.holds_out


def check_sweep(config: RunConfig, metrics: Collection[str]) -> Iterator[Problem]:
    """Check `sweep`. metrics: those of the task's evaluation."""
    sweep = config.sweep
    for name in sweep.objective:
        if name not in metrics and name not in COSTS:
            fix = f"some of {', '.join((*metrics, *COSTS))}"
            reason = f"task={config.task.name} measures no such thing"
            yield Problem("sweep.objective", reason, fix, format_value(sweep.objective))
        elif name in metrics and not holds_out(config):
            fix = "data.validation=rows.jsonl or data.split.validation=0.05"
            yield Problem("sweep.objective", "it is measured on validation rows, and none are held out", fix, name)
    if len(set(sweep.objective)) < len(sweep.objective):
        yield Problem("sweep.objective", "an objective is named twice", "name each once", format_value(sweep.objective))
    if sweep.dir is not None and not sweep.dir.strip():
        yield Problem("sweep.dir", "this is empty", "give a path, or leave it out", "''")
    launcher = launcher_of(config.launch)
    if sweep.parallel > 1 and not launcher.here and launcher.queue is None:
        reason = f"launch={config.launch.name} gives every trial all hosts"
        fix = "sweep.parallel=1, or launch=local or launch=slurm"
        yield Problem("sweep.parallel", reason, fix, str(sweep.parallel))
    if sweep.optuna:
        yield from _check_optuna(config, sweep.optuna, metrics)


def _check_optuna(config: RunConfig, sweep: OptunaConfig, metrics: Collection[str]) -> Iterator[Problem]:
    objective_names = objectives(config)
    if not sweep.objective and not holds_out(config):
        reason = "Optuna learns from an evaluation, and no validation rows are held out"
        fix = "data.validation=rows.jsonl, data.split.validation=0.05, or sweep.objective=[seconds]"
        yield Problem("sweep.objective", reason, fix, "[]")
    if sweep.sampler in SINGLE_OBJECTIVE_SAMPLERS and len(objective_names) > 1:
        reason = "this sampler supports only one objective"
        yield Problem("sweep.sampler", reason, "sweep.sampler=tpe, gp or nsgaii", sweep.sampler.name)
    if sweep.pruner is not Pruner.none:
        if len(objective_names) > 1:
            reason = "with several objectives, no trial can be judged worse than the others before it ends"
            yield Problem("sweep.pruner", reason, "one objective, or sweep.pruner=none", sweep.pruner.name)
        elif objective_names[0] not in metrics:
            reason = (
                f"trials are compared during training by their evaluations, which do not measure {objective_names[0]}"
            )
            yield Problem("sweep.pruner", reason, f"sweep.objective=[{next(iter(metrics))}]", sweep.pruner.name)
        if config.evaluate.every == 0:
            reason = "trials are compared by their evaluations during training, and evaluate.every=0 turns these off"
            fix = "evaluate.every=25%, or a number of optimizer steps"
            yield Problem("sweep.pruner", reason, fix, sweep.pruner.name)
        first = sweep.min_steps or first_evaluation(config)
        if first is not None and config.trainer.max_steps is not None and first >= config.trainer.max_steps:
            key = "sweep.min_steps" if sweep.min_steps else "evaluate.every"
            reason = f"no trial could be ended before its own end (trainer.max_steps={config.trainer.max_steps})"
            yield Problem(key, reason, f"{key}={max(1, config.trainer.max_steps // 4)}", str(first))
    if sweep.storage is not None and not re.match(STORAGES, sweep.storage):
        fix = "sqlite:///FILE, postgresql://..., mysql://..., redis://HOST or journal:FILE"
        yield Problem("sweep.storage", "Optuna has no such storage", fix, format_value(sweep.storage))
    if sweep.study is not None and not sweep.study.strip():
        yield Problem("sweep.study", "this is empty", "give a name, or leave it out", "''")
