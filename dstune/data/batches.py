"""The arrays of a micro-batch, by task."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dstune.config.schema import RunConfig
from dstune.data.collate import NO_TARGET, collate
from dstune.data.prepared import Split
from dstune.data.sampler import PAD_MULTIPLE, MicroBatch
from dstune.protocols import task_of
from dstune.protocols.task_options import BuildsBatches


def batch_of(
    config: RunConfig, split: Split, micro_batch: MicroBatch, pad_token_id: int, *, with_index: bool = False
) -> dict[str, Tensor]:
    """Return what the head of the run's task gets of `micro_batch`; with_index: and `index` [rows], the numbers of its samples,
    where rows have a loss of their own."""
    task, arrays = task_of(config.task), None
    if isinstance(task, BuildsBatches):
        arrays = task.collate(config, split, micro_batch, pad_token_id, with_index=with_index)
    if arrays is None:
        packing = config.data.packing
        return collate(split, micro_batch, pad_token_id=pad_token_id, packing=packing, with_index=with_index)
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}


def pair_batch(split: Split, micro_batch: MicroBatch, pad: int) -> dict[str, np.ndarray]:
    """Return `input_ids`, `attention_mask`, `labels` [2 pairs, sequence], the better answers first; `counted` [pairs]; and
    `reference` [2 pairs] where the split has it. Of reward models without labels, and with `margin` [pairs]."""
    samples = [split.sample(index) for index in micro_batch.samples]
    answers = [sample[name] for name in ("input_ids", "rejected_input_ids") for sample in samples]
    if "margin" in samples[0]:
        margin = np.array([sample["margin"] for sample in samples], dtype=np.float32)
        return {**padded(answers, None, pad), "margin": margin, "counted": counted(micro_batch)}
    labels = [sample[name] for name in ("labels", "rejected_labels") for sample in samples]
    arrays = padded(answers, labels, pad)
    if split.reference is not None:
        arrays["reference"] = reference(split, micro_batch).T.reshape(-1)
    return {**arrays, "counted": counted(micro_batch)}


def reference(split: Split, micro_batch: MicroBatch) -> np.ndarray:
    assert split.reference is not None
    return np.asarray(split.reference[[split.row(index) for index in micro_batch.samples]], dtype=np.float32)


def counted(micro_batch: MicroBatch) -> np.ndarray:
    return np.full(len(micro_batch.samples), 0 if micro_batch.filler else 1, dtype=np.int64)


def padded(ids: Sequence[np.ndarray], labels: Sequence[np.ndarray] | None, pad: int) -> dict[str, np.ndarray]:
    """Return `input_ids`, `attention_mask` and, where given, `labels`: int64 [rows, longest row rounded up to a multiple of 8]."""
    width = -(-max(len(row) for row in ids) // PAD_MULTIPLE) * PAD_MULTIPLE
    arrays = {
        "input_ids": np.full((len(ids), width), pad, dtype=np.int64),
        "attention_mask": np.zeros((len(ids), width), dtype=np.int64),
    }
    for number, row in enumerate(ids):
        arrays["input_ids"][number, : len(row)] = row
        arrays["attention_mask"][number, : len(row)] = 1
    if labels is not None:
        arrays["labels"] = np.full((len(ids), width), NO_TARGET, dtype=np.int64)
        for number, row in enumerate(labels):
            arrays["labels"][number, : len(row)] = row
    return arrays
