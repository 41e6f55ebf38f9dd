"""Labels of classes and tags: which rows have them, and their names in the order of their indices."""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np

from dstune.config.schema import RunConfig
from dstune.config.task_schema import ClassificationConfig, TagScheme, TokenClassificationConfig
from dstune.data.ingest import BadRows, Table
from dstune.data.rows import has_labels, has_several, sort_labels
from dstune.data.tags import OUTSIDE, completed, is_bio, marks_entities
from dstune.errors import Problem, UserError


@dataclass(frozen=True)
class ChosenRows:
    """Some rows of a table."""

    table: Table
    indices: np.ndarray
    bad_rows: int = 0

    @property
    def hashes(self) -> np.ndarray:
        return self.table.hashes[self.indices]

    @property
    def text_keys(self) -> np.ndarray:
        assert self.table.text_keys is not None
        return self.table.text_keys[self.indices]

    def keep(self, positions: np.ndarray, bad_rows: int = 0) -> ChosenRows:
        return ChosenRows(self.table, self.indices[positions], self.bad_rows + bad_rows)


def labels_of_training(chosen: dict[str, ChosenRows], config: RunConfig, bad: BadRows) -> tuple[str, ...]:
    """Label names by index; rows of the other parts with a label that training lacks are bad and left out."""
    if not has_labels(config.task):
        return ()
    assert isinstance(config.task, ClassificationConfig | TokenClassificationConfig)
    several = has_several(config.task)
    if config.data.streaming:  # all of them are named, and reading has refused the rows with others
        return tuple(config.task.labels)
    train = chosen["train"].table.labels
    assert train is not None
    labels = tuple(config.task.labels)
    if not labels and several:
        # Of all rows of the file: a label that fell into the rows held out alone is still one to answer no to.
        labels = sort_labels({name for row in np.unique(train) for name in json.loads(row)})
        if isinstance(config.task, TokenClassificationConfig) and config.task.scheme is not TagScheme.plain:
            labels = completed(labels)
    elif not labels:
        labels = sort_labels(np.unique(train[chosen["train"].indices]).tolist())
    if isinstance(config.task, TokenClassificationConfig):
        _refuse_odd_tags(config.task, labels)
        _refuse_other_metric(config, config.task, labels)
    if len(labels) < (1 if several else 2):
        reason = f"the training rows have one label only ({labels[0]!r})" if labels else "no training row has a label"
        raise UserError(Problem(where="data.train", value=str(config.data.train), reason=reason))
    for part, rows in chosen.items():
        assert rows.table.labels is not None
        names = rows.table.labels[rows.indices]
        unknown = {row: _unknown(row, labels, several) for row in np.unique(names)}
        seen = np.array([unknown[row] is None for row in names], dtype=bool)
        for position in np.flatnonzero(~seen):
            place, name = rows.table.place(rows.indices[position]), unknown[names[position]]
            bad.add(place, f"label {name!r} does not occur in the training rows ({', '.join(labels)})")
        chosen[part] = rows.keep(np.flatnonzero(seen), int((~seen).sum()))
        if not len(chosen[part].indices):
            bad.raise_if_any()
            raise UserError(Problem(where=f"data.{part}", reason="no row has a label that training knows"))
    return labels


def rows_by_label(rows: ChosenRows, config: RunConfig, labels: tuple[str, ...]) -> dict[str, int]:
    """How many rows have each of `labels`; a row with several of them counts for each. Empty for tasks without labels."""
    if not labels or rows.table.labels is None:
        return {}
    found = dict.fromkeys(labels, 0)
    names, counts = np.unique(rows.table.labels[rows.indices], return_counts=True)
    for name, count in zip(names.tolist(), counts.tolist(), strict=True):
        for label in set(json.loads(name)) if has_several(config.task) else (name,):
            found[label] += count
    return found


def _refuse_odd_tags(task: TokenClassificationConfig, labels: tuple[str, ...]) -> None:
    """Raises UserError where a few tags are no marks of entities and all others are: one that is mistyped would make them all
    tags of single words, measured by another metric."""
    odd = [label for label in labels if not is_bio([label])]
    marks = [label for label in labels if label not in odd and label != OUTSIDE]
    if task.scheme is TagScheme.auto and odd and OUTSIDE in labels and len(odd) < len(marks):
        reason = f"the tags mark entities ({', '.join(marks[:3])}), except {', '.join(odd[:5])}"
        fix = "task.scheme=bio names the rows, task.scheme=plain takes all for tags of single words"
        raise UserError(Problem("task.scheme", reason, fix, "auto"))


def _refuse_other_metric(config: RunConfig, task: TokenClassificationConfig, labels: tuple[str, ...]) -> None:
    """Raises UserError where these tags have no such metric, before anything is trained."""
    metric, entities = config.trainer.early_stopping.metric, marks_entities(labels, task.scheme)
    if metric.startswith("entity_") and not entities:
        reason, fix = "the tags are no marks of entities", "token_accuracy, f1_macro or loss"
    elif metric == "f1_macro" and entities:
        reason, fix = "the tags are marks of entities, which are measured as a whole", "entity_f1"
    else:
        return
    raise UserError(Problem("trainer.early_stopping.metric", reason, fix, metric))


def class_weights(config: RunConfig, labels: tuple[str, ...], train: ChosenRows) -> tuple[float, ...]:
    """How much a row of each class counts in the loss; empty where all count alike. Raises UserError for unknown names."""
    task = config.task
    if not isinstance(task, ClassificationConfig) or not (task.class_weights or task.balanced):
        return ()
    unknown = [name for name in task.class_weights if name not in labels]
    if unknown:
        reason = f"no row has this label; they have {', '.join(labels)}"
        raise UserError(Problem(f"task.class_weights.{name}", reason, "use their names") for name in unknown)
    weights = [task.class_weights.get(label, 1.0) for label in labels]
    if task.balanced:
        found = rows_by_label(train, config, labels)
        # A class without training rows has no weight to be balanced by, and no row that would need one but held-out ones.
        weights = [len(train.indices) / (len(labels) * found[label]) if found[label] else 1.0 for label in labels]
    # As the samples hold them, so that the sum over a window is that of the weights which the loss sees.
    return tuple(float(np.float32(weight)) for weight in weights)


def _unknown(row: str, labels: tuple[str, ...], several: bool) -> str | None:
    """The first label of a row that is not among `labels`."""
    names = json.loads(row) if several else [str(row)]
    return next((name for name in names if name not in labels), None)
