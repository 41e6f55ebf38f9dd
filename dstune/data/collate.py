"""Build the tensors of one forward pass from a micro-batch of sample indices."""

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
"""Label of a position that does not count in the loss (what torch's cross entropy ignores by default)."""

TOKEN_COLUMNS = {"labels": NO_TARGET, "token_type_ids": 0, "word_start": 0, "char_start": -1, "char_end": -1}
"""Columns with a value for each token, and the value that pads them; `input_ids` are padded with the padding token."""

ROW_COLUMNS = {
    "label": "labels",
    "loss_weight": "loss_weight",
    "start": "start_positions",
    "end": "end_positions",
    "null": "null_positions",
}
"""Columns with one value (or a list of fixed length) for each sample, and their names in a batch."""

OTHER_COLUMNS = ("input_ids", "target_ids", "bytes", COLUMN, *TEXTS)
"""Columns that `collate` reads by name, and those that only metrics read."""

TARGETS = ("labels", "start_positions", "end_positions")
"""Arrays of a batch that hold targets; a filler sets them to NO_TARGET, or to NaN if they are floats."""


def refuse_unknown_columns(task: Task, columns: Iterable[str]) -> None:
    """Raise UserError if the encoder of `task` gives columns unknown to `collate`, unless the task has its own `collate`."""
    unknown = sorted({*columns} - {*TOKEN_COLUMNS, *ROW_COLUMNS, *OTHER_COLUMNS})
    if unknown and not isinstance(task, BuildsBatches):
        reason = f"its encoder gives columns that no batch has: {', '.join(unknown)}"
        fix = "define collate in the task: it returns the arrays of a batch, or None if only metrics read these columns"
        raise UserError(Problem("task", reason, fix, task.name))


def collate(
    split: Split, micro_batch: MicroBatch, *, pad_token_id: int, packing: bool, with_index: bool = False
) -> dict[str, Tensor]:
    """Build the tensors of `micro_batch`, int64 or float32. Which ones depends on the columns of the samples.

    - Packed: `input_ids`, `labels`, `position_ids`, each [rows, longest row]. Positions restart at 0 with every sample, padding
      included, and there is no attention mask: transformers separates the samples by these restarts.
    - Not packed: `input_ids`, `attention_mask` and the columns in TOKEN_COLUMNS, each [rows, longest sample], rounded up to a
      multiple of 8 if the micro-batch is padded; those in ROW_COLUMNS are [rows], or [rows, labels] with several labels a row.
    - Rows whose features were computed before (`method=features`): `features` [rows, hidden] float32, and those in ROW_COLUMNS.
    - Encoder-decoder (samples with `target_ids`): `labels` is [rows, longest target rounded up to a multiple of 8].

    with_index: adds `index` [rows], the numbers of the samples. In a filler every target is -100, or NaN.
    If the split has images, the inputs made from them are added (`images.batch`); a micro-batch that needs an image and has none
    gets a last row with a blank image, in which every target is -100.
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
    """Return the decoder's labels of an encoder-decoder: int64 [rows, longest target rounded up to a multiple of 8]."""
    width = -(-max(map(len, targets)) // PAD_MULTIPLE) * PAD_MULTIPLE
    labels = np.full((len(targets), width), NO_TARGET, dtype=np.int64)
    for number, target in enumerate(targets):
        labels[number, : len(target)] = target
    return labels


def _only(row: Any) -> Any:
    """Return the single sample of a row."""
    (sample,) = row
    return sample


def _of_rows(samples: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Return the arrays of those columns in ROW_COLUMNS that the samples have."""
    arrays = {}
    for name, array_name in ROW_COLUMNS.items():
        if name in samples[0]:
            values = np.array([sample[name] for sample in samples])
            arrays[array_name] = values.astype(np.float32 if values.dtype.kind == "f" else np.int64)
    return arrays


def _mark_filler(arrays: dict[str, np.ndarray], micro_batch: MicroBatch) -> None:
    """Set the targets of a filler micro-batch to values that no loss or metric counts; leave other micro-batches as they are."""
    if not micro_batch.filler:
        return
    for name in arrays.keys() & set(TARGETS):
        # In a regression, -100 may be a target.
        arrays[name][:] = np.nan if arrays[name].dtype.kind == "f" else NO_TARGET


def _of_features(rows: list[dict[str, Any]], micro_batch: MicroBatch, with_index: bool) -> dict[str, Tensor]:
    arrays: dict[str, np.ndarray] = {"features": np.stack([row["features"] for row in rows]).astype(np.float32)}
    arrays |= _of_rows(rows)
    _mark_filler(arrays, micro_batch)
    if with_index:
        arrays["index"] = np.array(micro_batch.samples, dtype=np.int64)
    return {name: torch.from_numpy(array) for name, array in arrays.items()}
