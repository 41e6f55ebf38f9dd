"""Labels of classes and tags: which rows have them, and their names in the order of their indices."""

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
    """Return label names by index; rows of the other parts with a label that training lacks are bad and left out."""
    task = task_of(config.task)
    if not task.has_labels:
        return ()
    several, labels = task.several_labels, task.given_labels
    if config.data.streaming:  # all of them are named, and reading has refused the rows with others
        return labels
    train = chosen["train"].table.labels
    assert train is not None
    if not labels and several:
        # Of all rows of the file: a label that fell into the rows held out alone is still one to answer no to.
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
    """Return how many rows have each of `labels`; a row with several of them counts for each. Empty for tasks without labels."""
    if not labels or rows.table.labels is None:
        return {}
    count_by_label = dict.fromkeys(labels, 0)
    names, counts = np.unique(rows.table.labels[rows.indices], return_counts=True)
    for name, count in zip(names.tolist(), counts.tolist(), strict=True):
        for label in set(json.loads(name)) if task_of(config.task).several_labels else (name,):
            count_by_label[label] += count
    return count_by_label


def class_weights(config: RunConfig, labels: tuple[str, ...], train: ChosenRows) -> tuple[float, ...]:
    """Return how much a row of each class counts in the loss; empty where all count alike. Raises UserError for unknown names."""
    counts = partial(rows_by_label, train, config, labels)
    task = task_of(config.task)
    weights = task.class_weights(labels, counts, len(train.indices)) if isinstance(task, WeighsClasses) else ()
    # As the samples hold them, so that the sum over a global batch is that of the weights which the loss sees.
    return tuple(float(np.float32(weight)) for weight in weights)


def _unknown(row: str, labels: tuple[str, ...], several: bool) -> str | None:
    """Return the first label of a row that is not among `labels`."""
    names = json.loads(row) if several else [str(row)]
    return next((name for name in names if name not in labels), None)
