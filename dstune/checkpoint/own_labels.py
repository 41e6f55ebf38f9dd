"""The labels of a model that is trained already, which are its own whatever rows it meets."""

from __future__ import annotations

from dataclasses import replace

from dstune.checkpoint.record import HEADS
from dstune.config.schema import RunConfig
from dstune.config.task_schema import ClassificationConfig, RewardConfig, TokenClassificationConfig
from dstune.errors import Problem, UserError
from dstune.models.load import load_config


def with_labels(config: RunConfig) -> RunConfig:
    """The model's own labels in their order, whatever labels the rows have, and whether a row may have several.

    Raises UserError where the model has no trained head for the task.
    """
    named = "classification" if isinstance(config.task, RewardConfig) else config.task.name
    end = next((end for end, task in HEADS.items() if task == named), None)
    if end is None:
        return config
    architecture = load_config(config.model)
    if not any(name.endswith(end) for name in architecture.architectures or []):
        kind = named.replace("_", " ")
        reason = f"the model has no trained {kind} head, so its answers would be chance"
        raise UserError(Problem("MODEL", reason, f"give a model for {kind}, or train one", config.model.path))
    if isinstance(config.task, RewardConfig):
        if architecture.num_labels != 1:
            reason = f"a reward model has one output, and this one has {architecture.num_labels}"
            raise UserError(Problem("MODEL", reason, "give a reward model, or train one", config.model.path))
        return config
    if not isinstance(config.task, ClassificationConfig | TokenClassificationConfig):
        return config
    several = architecture.problem_type == "multi_label_classification"
    one_number = architecture.num_labels == 1 and not several  # whatever it says: a choice of one is none
    if isinstance(config.task, ClassificationConfig) and (architecture.problem_type == "regression" or one_number):
        return replace(config, task=replace(config.task, regression=True, labels=[]))
    labels = [architecture.id2label[index] for index in sorted(architecture.id2label)]
    own_names = any(label != f"LABEL_{index}" for index, label in enumerate(labels))
    task = replace(config.task, labels=labels) if own_names else config.task
    if task.labels and len(task.labels) != len(labels):
        reason = f"the model has {len(labels)} labels, and these are {len(task.labels)}"
        raise UserError(Problem("task.labels", reason, "name them all, in their order", ", ".join(task.labels)))
    if isinstance(task, ClassificationConfig) and several:
        task = replace(task, multi_label=True)
    return replace(config, task=task)
