"""Build the arrays of a micro-batch, by task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dstune.config.schema import RunConfig
from dstune.data.collate import NO_TARGET, collate
from dstune.data.images.batch import blank_sample, image_inputs
from dstune.data.images.places import COLUMN
from dstune.data.prepared import Split
from dstune.data.sampler import PAD_MULTIPLE, MicroBatch
from dstune.protocols import task_of
from dstune.protocols.task_options import BuildsBatches


def batch_of(
    config: RunConfig, split: Split, micro_batch: MicroBatch, pad_token_id: int, *, with_index: bool = False
) -> dict[str, Tensor]:
    """Return the tensors of `micro_batch` that the head of the run's task reads.

    with_index: adds `index` [rows], the numbers of its samples, if each row has its own loss.
    """
    task, arrays = task_of(config.task), None
    if isinstance(task, BuildsBatches):
        arrays = task.collate(config, split, micro_batch, pad_token_id, with_index=with_index)
    if arrays is None:
        packing = config.data.packing
        return collate(split, micro_batch, pad_token_id=pad_token_id, packing=packing, with_index=with_index)
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}


def pair_batch(split: Split, micro_batch: MicroBatch, pad: int) -> dict[str, np.ndarray]:
    """Return the arrays of a micro-batch of pairs of answers; in each array all better answers come first.

    `input_ids`, `attention_mask` and `labels` [2 pairs, sequence], `counted` [pairs], and `reference` [2 pairs] if the split has
    it. For reward models `margin` [pairs] instead of `labels`. If the split has images, the inputs made from them too, once for
    each answer of a pair; a micro-batch that needs an image and has none gets a last pair with a blank image, which does not
    count.
    """
    samples = [split.sample(index) for index in micro_batch.samples]
    if "margin" in samples[0]:
        answers = [sample[name] for name in ("input_ids", "rejected_input_ids") for sample in samples]
        margin = np.array([sample["margin"] for sample in samples], dtype=np.float32)
        return {**padded(answers, None, pad), "margin": margin, "counted": counted(micro_batch)}
    blanks = blank_samples(split, micro_batch, samples)
    samples = [*samples, *blanks]
    rows = [(s[f"{answer}input_ids"], s[f"{answer}labels"]) for answer in ("", "rejected_") for s in samples]
    arrays = rows_with_images(split, rows, samples * 2, pad)
    if split.reference is not None:
        arrays["reference"] = reference(split, micro_batch, blanks).T.reshape(-1)
    return {**arrays, "counted": counted(micro_batch, blanks)}


Blanks = Sequence[dict[str, Any]]


def blank_samples(split: Split, micro_batch: MicroBatch, samples: Sequence[dict[str, Any]]) -> Blanks:
    """Return a sample with a blank image if `micro_batch` needs an image and none of its `samples` has one; otherwise nothing."""
    lacks_image = micro_batch.needs_image and not any(len(sample[COLUMN]) for sample in samples)
    return [blank_sample(split, samples[0])] if lacks_image else []


def rows_with_images(
    split: Split,
    rows: Sequence[tuple[np.ndarray, np.ndarray]],
    samples: Sequence[dict[str, Any]],
    pad: int,
) -> dict[str, np.ndarray]:
    """Return `padded` rows of ids and labels; if the split has images, the inputs made from each row's images too."""
    arrays = padded([ids for ids, _ in rows], [labels for _, labels in rows], pad)
    if split.images is None:
        return arrays
    shown = [[{"input_ids": ids, COLUMN: s[COLUMN]}] for (ids, _), s in zip(rows, samples, strict=True)]
    tensors = {"input_ids": torch.from_numpy(arrays["input_ids"])}
    image_tensors = image_inputs(split, shown, tensors, packing=False)
    return arrays | {name: tensor.numpy() for name, tensor in image_tensors.items()}


def reference(split: Split, micro_batch: MicroBatch, blanks: Blanks = ()) -> np.ndarray:
    """Return the reference model's log-probabilities of the samples' answers, [samples, answers]; 0 for blank samples."""
    assert split.reference is not None
    logps = np.asarray(split.reference[[split.row(index) for index in micro_batch.samples]], dtype=np.float32)
    return np.concatenate([logps, np.zeros((len(blanks), logps.shape[1]), np.float32)])


def counted(micro_batch: MicroBatch, blanks: Blanks = ()) -> np.ndarray:
    """Return 1 for each sample that counts, 0 for those of a filler and blank ones: int64 [samples and blanks]."""
    real = np.full(len(micro_batch.samples), 0 if micro_batch.filler else 1, dtype=np.int64)
    return np.concatenate([real, np.zeros(len(blanks), np.int64)])


def padded(ids: Sequence[np.ndarray], labels: Sequence[np.ndarray] | None, pad: int) -> dict[str, np.ndarray]:
    """Return `input_ids`, `attention_mask` and, if given, `labels`: int64 [rows, longest row rounded up to a multiple of 8]."""
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
