"""Which rows make up each part: those of its own file, or those held out from the training rows."""

from __future__ import annotations

import numpy as np

from dstune.config.fields import Automatic
from dstune.config.forgetting import mixes_in
from dstune.config.schema import RunConfig
from dstune.core.errors import Problem, UserError
from dstune.data.clean.tables import Cleaning
from dstune.data.ingest import Table
from dstune.data.inputs import PARTS
from dstune.data.labels import ChosenRows
from dstune.data.split import TEST, TRAIN, VALIDATION, assign, automatic_share, lowest
from dstune.protocols import task_of


def choose(tables: dict[str, Table], config: RunConfig) -> dict[str, ChosenRows]:
    """Choose which rows make up each part: those of its own file, or those held out from the training file."""
    train, split = ChosenRows(tables["train"], tables["train"].rows), config.data.split
    target_rows = np.arange(len(train.indices))
    if mixes_in(config):  # general rows are there to be trained on; what is measured is the task
        target_rows = np.flatnonzero(of_task(train))
    parts = np.full(len(train.indices), TRAIN, dtype=np.int8)
    # A row with several labels cannot be a share of each of them.
    labelled = train.table.labels is not None and not task_of(config.task).several_labels
    share = split.validation
    if isinstance(share, Automatic):  # without a run that has chosen it
        share, _ = automatic_share(train.hashes[target_rows], labelled=labelled)
    parts[target_rows] = assign(
        train.hashes[target_rows],
        train.table.labels[train.indices[target_rows]] if labelled and train.table.labels is not None else None,
        validation=0.0 if "validation" in tables else share,
        test=0.0 if "test" in tables else split.test,
    )
    chosen = {"train": train.keep(np.flatnonzero(parts == TRAIN))}
    numbers = {"validation": VALIDATION, "test": TEST}
    for part in PARTS[1:]:
        if part in tables:
            rows = ChosenRows(tables[part], tables[part].rows)
        elif part in numbers:
            rows = train.keep(np.flatnonzero(parts == numbers[part]))
        else:
            continue
        if len(rows.indices):
            # By hash, so that the first N rows are a fair sample and not, say, all of the first label.
            chosen[part] = rows.keep(np.argsort(rows.hashes, kind="stable"))
    return chosen


def of_task(rows: ChosenRows) -> np.ndarray:
    """Return which rows are those of the task with `forgetting.replay`, bool [rows]."""
    assert rows.table.sources is not None
    return np.asarray(rows.table.sources[rows.indices] == 0)


def limited(rows: ChosenRows, config: RunConfig) -> ChosenRows:
    """Return `data.max_rows` of the training rows; general rows are not counted."""
    if config.data.max_rows is None:
        return rows
    if not mixes_in(config):
        return rows.keep(lowest(rows.hashes, config.data.max_rows))
    task = np.flatnonzero(of_task(rows))
    chosen_rows = task[lowest(rows.hashes[task], config.data.max_rows)]
    return rows.keep(np.sort(np.concatenate([chosen_rows, np.flatnonzero(~of_task(rows))])))


def leave_out_leaks(chosen: dict[str, ChosenRows], cleaning: Cleaning) -> None:
    train = chosen["train"]
    held_out = [(rows.table, rows.indices) for part, rows in chosen.items() if part != "train"]
    rows = cleaning.without_leaks((train.table, train.indices), held_out)
    if len(train.indices) and not len(rows):
        reason = "every training row occurs in a held-out part as well"
        raise UserError(Problem(where="data.clean.leaks", value="true", reason=reason, fix="data.clean.leaks=false"))
    chosen["train"] = ChosenRows(train.table, rows, train.bad_rows)
