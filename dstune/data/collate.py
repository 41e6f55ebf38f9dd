"""From a micro-batch of sample indices to the tensors of one forward pass."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dstune.data.prepared import Split
from dstune.data.sampler import PAD_MULTIPLE, MicroBatch

NO_TARGET = -100
"""Label of a position that does not count (the value that torch's cross entropy ignores by default)."""


def collate(
    split: Split, micro_batch: MicroBatch, *, pad_token_id: int, packing: bool, classification: bool
) -> dict[str, Tensor]:
    """Tensors of `micro_batch`, all int64.

    Packed: `input_ids`, `labels`, `position_ids`, each [rows, longest row]. Positions restart at 0 with every sample,
    padding included, and there is no attention mask: from the restarts transformers keeps samples apart.
    Not packed: `input_ids`, `attention_mask`, `labels`, each [rows, longest sample rounded up to a multiple of 8].
    Classification: `input_ids`, `attention_mask`, `labels` [rows] and `index` [rows] (sample numbers); with several labels
    a row, `labels` is [rows, labels] of 0 and 1; for pairs of texts `token_type_ids` where the model is told.
    In a filler every label is -100.
    """
    assert not (packing and classification), "classification rows hold one sample"
    rows = [[split.sample(index) for index in row] for row in micro_batch.rows]
    longest = max(sum(len(sample["input_ids"]) for sample in row) for row in rows)
    width = longest if packing else -(-longest // PAD_MULTIPLE) * PAD_MULTIPLE
    shape = (len(rows), width)
    input_ids = np.full(shape, pad_token_id, dtype=np.int64)
    real = np.zeros(shape, dtype=np.int64)
    labels = np.full(shape, NO_TARGET, dtype=np.int64)
    position_ids = np.zeros(shape, dtype=np.int64)
    with_segments = "token_type_ids" in rows[0][0]
    segments = np.zeros(shape, dtype=np.int64)
    for number, row in enumerate(rows):
        end = 0
        for sample in row:
            start, end = end, end + len(sample["input_ids"])
            input_ids[number, start:end] = sample["input_ids"]
            real[number, start:end] = 1
            if with_segments:
                segments[number, start:end] = sample["token_type_ids"]
            position_ids[number, start:end] = np.arange(end - start)
            if not classification and not micro_batch.filler:
                labels[number, start:end] = sample["labels"]
        position_ids[number, end:] = np.arange(width - end)

    if packing:
        arrays = {"input_ids": input_ids, "labels": labels, "position_ids": position_ids}
    elif classification:
        classes = np.array([row[0]["label"] for row in rows], dtype=np.int64)
        if micro_batch.filler:
            classes[:] = NO_TARGET
        arrays = {
            "input_ids": input_ids,
            "attention_mask": real,
            "labels": classes,
            "index": np.array(micro_batch.samples, dtype=np.int64),
        }
        if with_segments:
            arrays["token_type_ids"] = segments
    else:
        arrays = {"input_ids": input_ids, "attention_mask": real, "labels": labels}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}
