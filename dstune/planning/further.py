"""Models that a run holds in addition to the one it trains, such as a teacher."""

from __future__ import annotations

from dataclasses import replace

from dstune.config.schema import ModelConfig, RunConfig
from dstune.core.errors import Problem, UserError
from dstune.planning import source
from dstune.planning.architecture import architecture_or_count
from dstune.planning.setup import HeldModel, head_of, labels_of
from dstune.protocols import task_of
from dstune.protocols.task_options import KeepsFurtherModels


def held_models(config: RunConfig) -> tuple[tuple[HeldModel, ...], tuple[Problem, ...]]:
    """Return the models that the task holds during training, and the problems of those that cannot be counted."""
    task = task_of(config.task)
    if not isinstance(task, KeepsFurtherModels):
        return (), ()
    models = []
    for further in task.resident_models:
        if (path := getattr(config.task, further.path)) is not None:
            model_config = ModelConfig(path=path, revision=getattr(config.task, further.revision))
            models.append((further.path, f"task.{further.path}", model_config))
    if task.keeps_start_model(config):
        models.append(("reference", "model.path", config.model))
    held, problems = [], []
    for name, key, where in models:
        try:
            values, whole = source.config_json(where), source.whole_config_json(where)
            model = architecture_or_count(values, whole, head_of(config), labels_of(config))
            held.append(HeldModel(name, model, source.unreached_weights(where, model)))
        except UserError as error:
            problems += [replace(problem, where=key) for problem in error.problems]
    return tuple(held), tuple(problems)


def uncounted_models(config: RunConfig) -> list[str]:
    """Return a warning for each model that the plan leaves out."""
    return [f"{problem.where} is not counted: {problem.reason}" for problem in held_models(config)[1]]
