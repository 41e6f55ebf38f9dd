"""Labels of classes and tags: their names in the order of their indices, their rows and their weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial

import numpy as np

from dstune.config.schema import RunConfig
from dstune.core.errors import Problem, UserError
from dstune.data.bad_rows import BadRows
from dstune.data.ingest import Table
from dstune.data.rows import sort_labels
from dstune.protocols import task_of
from dstune.protocols.task_options import CompletesLabels, WeighsClasses


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
    """Return the label names in the order of their indices.

    Rows of the other parts with a label that no training row has are added to `bad` and removed from `chosen`. Raises UserError
    if the training rows have too few labels.
    """
    task = task_of(config.task)
    if not task.has_labels:
        return ()
    several, labels = task.several_labels, task.given_labels
    if config.data.streaming:  # the task names all labels, and rows with others were refused when they were read
        return labels
    train = chosen["train"].table.labels
    assert train is not None
    if not labels and several:
        # All rows of the file count: to a label that only held-out rows have, the model has to learn to answer no.
        labels = sort_labels({name for row in np.unique(train) for name in json.loads(row)})
        if isinstance(task, CompletesLabels):
            labels = task.complete_labels(labels)
    elif not labels:
        labels = sort_labels(np.unique(train[chosen["train"].indices]).tolist())
    if isinstance(task, CompletesLabels):
        task.check_labels(config, labels)
    if len(labels) < (1 if several else 2):
        reason = f"the training rows have one label only ({labels[0]!r})" if labels else "no training row has a label"
        raise UserError(Problem(where="data.train", value=str(config.data.train), reason=reason))
    for part, rows in chosen.items():
        assert rows.table.labels is not None
        names = rows.table.labels[rows.indices]
        unknown = {row: _unknown(row, labels, several) for row in np.unique(names)}
        is_known = np.array([unknown[row] is None for row in names], dtype=bool)
        for position in np.flatnonzero(~is_known):
            place, name = rows.table.place(rows.indices[position]), unknown[names[position]]
            bad.add(place, f"label {name!r} does not occur in the training rows ({', '.join(labels)})")
        chosen[part] = rows.keep(np.flatnonzero(is_known), int((~is_known).sum()))
        if not len(chosen[part].indices):
            bad.raise_if_any()
            raise UserError(Problem(where=f"data.{part}", reason="no row has a label that training knows"))
    return labels


def rows_by_label(rows: ChosenRows, config: RunConfig, labels: tuple[str, ...]) -> dict[str, int]:
    """Return the number of rows with each of `labels`; a row with several labels counts for each. Empty without labels."""
    if not labels or rows.table.labels is None:
        return {}
    count_by_label = dict.fromkeys(labels, 0)
    names, counts = np.unique(rows.table.labels[rows.indices], return_counts=True)
    for name, count in zip(names.tolist(), counts.tolist(), strict=True):
        for label in set(json.loads(name)) if task_of(config.task).several_labels else (name,):
            count_by_label[label] += count
    return count_by_label


def class_weights(config: RunConfig, labels: tuple[str, ...], train: ChosenRows) -> tuple[float, ...]:
    """Return the weight in the loss of each class's rows; empty if all weigh the same. Raises UserError for unknown names."""
    counts = partial(rows_by_label, train, config, labels)
    task = task_of(config.task)
    weights = task.class_weights(labels, counts, len(train.indices)) if isinstance(task, WeighsClasses) else ()
    # Rounded as samples store them, so that the total of a global batch is the sum of the weights in the loss.
    return tuple(float(np.float32(weight)) for weight in weights)


def _unknown(row: str, labels: tuple[str, ...], several: bool) -> str | None:
    """Return the first label of a row that is not among `labels`; None if all are."""
    names = json.loads(row) if several else [str(row)]
    return next((name for name in names if name not in labels), None)
