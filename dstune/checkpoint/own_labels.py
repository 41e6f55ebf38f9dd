"""Takes the labels from a model that has a trained head, regardless of the rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transformers import PretrainedConfig

from dstune.config.schema import RunConfig
from dstune.core.errors import Problem, UserError
from dstune.models.load import load_config
from dstune.protocols import task_of
from dstune.protocols.task_options import ReadsArchitecture


def with_labels(config: RunConfig) -> RunConfig:
    """Return `config` with the task's settings from the model: its labels in order, and whether a row may have several.

    Raises UserError if the model has no trained head for the task.
    """
    task = task_of(config.task)
    if not task.head_classes:
        return config
    architecture = load_config(config.model)
    if not any(name.endswith(task.head_classes) for name in architecture.architectures or []):
        kind = task.name.replace("_", " ")
        reason = f"the model has no trained {kind} head, so its answers would be chance"
        raise UserError(Problem("MODEL", reason, f"give a {kind} model, or train one", config.model.path))
    return task.from_architecture(config, architecture) if isinstance(task, ReadsArchitecture) else config


def name_labels(run: RunConfig, architecture: PretrainedConfig, **values: Any) -> RunConfig:
    """Return `run` with the model's labels, if they have names, and with `values` set in its task.

    Raises UserError if `task.labels` has another number of labels.
    """
    labels = [architecture.id2label[index] for index in sorted(architecture.id2label)]
    own_names = any(label != f"LABEL_{index}" for index, label in enumerate(labels))
    task: Any = run.task
    task = replace(task, labels=labels) if own_names else task
    if task.labels and len(task.labels) != len(labels):
        reason = f"the model has {len(labels)} labels, and these are {len(task.labels)}"
        raise UserError(Problem("task.labels", reason, "name them all, in their order", ", ".join(task.labels)))
    return replace(run, task=replace(task, **values))
