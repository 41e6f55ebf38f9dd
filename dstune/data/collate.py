"""From a micro-batch of sample indices to the tensors of one forward pass."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dstune.core.errors import Problem, UserError
from dstune.data.images.batch import blank_sample, image_inputs
from dstune.data.images.places import COLUMN
from dstune.data.prepared import TEXTS, Split
from dstune.data.sampler import PAD_MULTIPLE, MicroBatch
from dstune.protocols import Task
from dstune.protocols.task_options import BuildsBatches

NO_TARGET = -100
"""Label of a position that does not count (the value that torch's cross entropy ignores by default)."""

TOKEN_COLUMNS = {"labels": NO_TARGET, "token_type_ids": 0, "word_start": 0, "char_start": -1, "char_end": -1}
"""Columns of a sample with a value for each token, padded with this; `input_ids` with the padding token."""

ROW_COLUMNS = {
    "label": "labels",
    "loss_weight": "loss_weight",
    "start": "start_positions",
    "end": "end_positions",
    "null": "null_positions",
}
"""Columns of a sample with one value (or a list of fixed length) by the name that a batch gives them."""

OTHER_COLUMNS = ("input_ids", "target_ids", "bytes", COLUMN, *TEXTS)
"""Columns that `collate` reads by name, and those that metrics alone read."""

TARGETS = ("labels", "start_positions", "end_positions")
"""What of a batch is NO_TARGET in a filler, or NaN where targets are numbers of any kind."""


def refuse_unknown_columns(task: Task, columns: Iterable[str]) -> None:
    """Raises UserError where the encoder of `task` gives columns that `collate` leaves out of a batch, and the task has no
    `collate` of its own."""
    unknown = sorted({*columns} - {*TOKEN_COLUMNS, *ROW_COLUMNS, *OTHER_COLUMNS})
    if unknown and not isinstance(task, BuildsBatches):
        reason = f"its encoder gives columns that no batch has: {', '.join(unknown)}"
        fix = "define collate in the task: it returns the arrays of a batch, or None if only metrics read these columns"
        raise UserError(Problem("task", reason, fix, task.name))


def collate(
    split: Split, micro_batch: MicroBatch, *, pad_token_id: int, packing: bool, with_index: bool = False
) -> dict[str, Tensor]:
    """Build the tensors of `micro_batch`, int64 or float32. What a batch holds follows from what the samples hold.

    Packed: `input_ids`, `labels`, `position_ids`, each [rows, longest row]. Positions restart at 0 with every sample,
    padding included, and there is no attention mask: from the restarts transformers keeps samples apart.
    Not packed: `input_ids`, `attention_mask` and what TOKEN_COLUMNS names, each [rows, longest sample rounded up to a
    multiple of 8, or without padding]; what ROW_COLUMNS names is [rows], with several labels a row [rows, labels].
    Rows whose body was run before (`method=features`): `features` [rows, hidden] float32 and what ROW_COLUMNS names.
    For an encoder-decoder (samples with `target_ids`) `labels` is [rows, longest target rounded up to a multiple of 8].
    with_index: `index` [rows] (sample numbers) too. In a filler every target is -100.
    Of a split with images also what the model's processor makes of them (`images.batch`); a micro-batch that needs an image and
    has none gets a last row with a blank one, in which every target is -100.
    """
    rows = [[split.sample(index) for index in row] for row in micro_batch.rows]
    columns = rows[0][0].keys()
    if micro_batch.needs_image and not any(len(sample[COLUMN]) for row in rows for sample in row):
        rows.append([blank_sample(split, rows[0][0])])
    if "features" in columns:
        return _of_features([_only(row) for row in rows], micro_batch, with_index)
    longest = max(sum(len(sample["input_ids"]) for sample in row) for row in rows)
    width = longest if packing or not micro_batch.padded else -(-longest // PAD_MULTIPLE) * PAD_MULTIPLE
    shape = (len(rows), width)
    padding = {"input_ids": pad_token_id} | {name: value for name, value in TOKEN_COLUMNS.items() if name in columns}
    arrays = {name: np.full(shape, value, dtype=np.int64) for name, value in padding.items()}
    real = np.zeros(shape, dtype=np.int64)
    position_ids = np.zeros(shape, dtype=np.int64)
    for number, row in enumerate(rows):
        end = 0
        for sample in row:
            start, end = end, end + len(sample["input_ids"])
            for name, array in arrays.items():
                array[number, start:end] = sample[name]
            real[number, start:end] = 1
            position_ids[number, start:end] = np.arange(end - start)
        position_ids[number, end:] = np.arange(width - end)

    of_rows = _of_rows([row[0] for row in rows])
    assert not (packing and of_rows), "a packed row has no target of its own"
    arrays |= of_rows
    if "target_ids" in columns:
        arrays["labels"] = _targets([_only(row)["target_ids"] for row in rows])
    _mark_filler(arrays, micro_batch)
    arrays["position_ids" if packing else "attention_mask"] = position_ids if packing else real
    if with_index:
        arrays["index"] = np.array([_only(row) for row in micro_batch.rows], dtype=np.int64)
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    if split.images is None:
        return tensors
    return tensors | image_inputs(split, rows, tensors, packing=packing)


def _targets(targets: list[np.ndarray]) -> np.ndarray:
    """Return labels of a decoder beside an encoder, int64 [rows, longest target rounded up]."""
    width = -(-max(map(len, targets)) // PAD_MULTIPLE) * PAD_MULTIPLE
    labels = np.full((len(targets), width), NO_TARGET, dtype=np.int64)
    for number, target in enumerate(targets):
        labels[number, : len(target)] = target
    return labels


def _only(row: Any) -> Any:
    (sample,) = row
    return sample


def _of_rows(samples: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Return what ROW_COLUMNS names, of the samples that have it."""
    arrays = {}
    for name, array_name in ROW_COLUMNS.items():
        if name in samples[0]:
            values = np.array([sample[name] for sample in samples])
            arrays[array_name] = values.astype(np.float32 if values.dtype.kind == "f" else np.int64)
    return arrays


def _mark_filler(arrays: dict[str, np.ndarray], micro_batch: MicroBatch) -> None:
    """Set the targets of a filler micro-batch to values that no loss or metric counts."""
    for name in arrays.keys() & set(TARGETS) if micro_batch.filler else ():
        # Any number may be a target of a regression.
        arrays[name][:] = np.nan if arrays[name].dtype.kind == "f" else NO_TARGET


def _of_features(rows: list[dict[str, Any]], micro_batch: MicroBatch, with_index: bool) -> dict[str, Tensor]:
    arrays: dict[str, np.ndarray] = {"features": np.stack([row["features"] for row in rows]).astype(np.float32)}
    arrays |= _of_rows(rows)
    _mark_filler(arrays, micro_batch)
    if with_index:
        arrays["index"] = np.array(micro_batch.samples, dtype=np.int64)
    return {name: torch.from_numpy(array) for name, array in arrays.items()}
