"""The tensors of a micro-batch, by task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from dstune.config.schema import RunConfig
from dstune.config.task_schema import EmbeddingConfig, PreferenceConfig, RewardConfig
from dstune.data.collate import NO_TARGET, collate
from dstune.data.prepared import Split
from dstune.data.sampler import PAD_MULTIPLE, MicroBatch
from dstune.data.tokenize.contrastive import COLUMNS

NEAR = 16
"""Samples behind one among which the answer to another prompt is looked for."""


def batch_of(
    config: RunConfig, split: Split, micro_batch: MicroBatch, pad_token_id: int, *, with_index: bool = False
) -> dict[str, Tensor]:
    """What the head of the run's task gets of `micro_batch`; with_index: and `index` [rows], the numbers of its samples."""
    task = config.task
    if isinstance(task, EmbeddingConfig):
        arrays = _contrastive(micro_batch, [split.sample(index) for index in micro_batch.samples], pad_token_id)
        index = {"index": np.array(micro_batch.samples, dtype=np.int64)} if with_index else {}
        return _tensors(arrays | index)
    if not isinstance(task, (PreferenceConfig, RewardConfig)):
        packing = config.data.packing
        return collate(split, micro_batch, pad_token_id=pad_token_id, packing=packing, with_index=with_index)
    samples = [split.sample(index) for index in micro_batch.samples]
    if isinstance(task, PreferenceConfig) and task.single:
        return _tensors(_judged(split, micro_batch, samples, pad_token_id, config.data.max_length))
    return _tensors(_pairs(split, micro_batch, samples, pad_token_id))


def _pairs(split: Split, micro_batch: MicroBatch, samples: list[dict[str, Any]], pad: int) -> dict[str, np.ndarray]:
    """`input_ids`, `attention_mask`, `labels` [2 pairs, sequence], the better answers first; `counted` [pairs]; and
    `reference` [2 pairs] where the split has it. Of reward models without labels, and with `margin` [pairs]."""
    answers = [sample[name] for name in ("input_ids", "rejected_input_ids") for sample in samples]
    if "margin" in samples[0]:
        margin = np.array([sample["margin"] for sample in samples], dtype=np.float32)
        return {**padded(answers, None, pad), "margin": margin, "counted": _counted(micro_batch)}
    labels = [sample[name] for name in ("labels", "rejected_labels") for sample in samples]
    arrays = padded(answers, labels, pad)
    if split.reference is not None:
        arrays["reference"] = _reference(split, micro_batch).T.reshape(-1)
    return {**arrays, "counted": _counted(micro_batch)}


def _contrastive(micro_batch: MicroBatch, samples: list[dict[str, Any]], pad: int) -> dict[str, np.ndarray]:
    """`input_ids`, `attention_mask` [texts, sequence]: anchors, positives, and the negatives of the pairs that have one,
    whose numbers are `negative_owner`; `anchor_key`, `positive_key`, `negative_key`, equal for equal texts; `counted`
    [pairs]."""
    texts = {kind: [sample[name] for sample in samples] for kind, name in COLUMNS.items()}
    owners = [number for number, tokens in enumerate(texts["negative"]) if len(tokens)]
    texts["negative"] = [texts["negative"][owner] for owner in owners]
    keys = {f"{kind}_key": np.array([_key(ids) for ids in of], dtype=np.int64) for kind, of in texts.items()}
    arrays = padded([ids for of in texts.values() for ids in of], None, pad)
    return {**arrays, **keys, "negative_owner": np.array(owners, dtype=np.int64), "counted": _counted(micro_batch)}


def _key(ids: np.ndarray) -> int:
    """Equal for equal tokens; a signed number of 64 bits."""
    return xxhash.xxh3_64_intdigest(np.asarray(ids, dtype=np.int32).tobytes()) - 2**63


def _judged(
    split: Split, micro_batch: MicroBatch, samples: list[dict[str, Any]], pad: int, max_length: int
) -> dict[str, np.ndarray]:
    """`input_ids`, `attention_mask`, `labels` [rows, sequence]; the same after `other_` with an answer to another
    prompt in place of the row's own; `desirable` and `counted` [rows]; `reference`, `other_reference` [rows] where the split has
    them."""
    others = [
        _of_another_prompt(split, index, sample) for index, sample in zip(micro_batch.samples, samples, strict=True)
    ]
    exchanged = [_exchanged(sample, other, max_length) for sample, other in zip(samples, others, strict=True)]
    arrays = padded([sample["input_ids"] for sample in samples], [sample["labels"] for sample in samples], pad)
    mismatched = padded([ids for ids, _ in exchanged], [labels for _, labels in exchanged], pad)
    arrays |= {f"other_{name}": array for name, array in mismatched.items()}
    if split.reference is not None:
        reference = _reference(split, micro_batch)
        arrays |= {"reference": reference[:, 0], "other_reference": reference[:, 1]}
    desirable = np.array([sample["desirable"] for sample in samples], dtype=np.int64)
    return {**arrays, "desirable": desirable, "counted": _counted(micro_batch)}


def _of_another_prompt(split: Split, index: int, sample: dict[str, Any]) -> dict[str, Any]:
    """The next sample behind `index` with another prompt, since the answers to one stand together in the data, and as good or
    bad an answer, so that the shares of both stay; without the latter where none is near."""
    prompt = _prompt(sample)
    first: dict[str, Any] | None = None
    for distance in range(1, NEAR + 1):
        other = split.neighbour(index, distance)
        if not np.array_equal(_prompt(other), prompt):
            if other["desirable"] == sample["desirable"]:
                return other
            first = first or other
    return first or split.neighbour(index)


def _prompt(sample: dict[str, Any]) -> np.ndarray:
    """Everything in front of the first target."""
    ids: np.ndarray = sample["input_ids"][: int(np.argmax(sample["labels"] != NO_TARGET))]
    return ids


def _exchanged(sample: dict[str, Any], other: dict[str, Any], max_length: int) -> tuple[np.ndarray, np.ndarray]:
    """The prompt of `sample` with the answer of `other`, which is everything from its first target on; ids and labels."""
    prompt, answer = (len(_prompt(of)) for of in (sample, other))
    ids = np.concatenate([_prompt(sample), other["input_ids"][answer:]])
    labels = np.concatenate([sample["labels"][:prompt], other["labels"][answer:]])
    return ids[:max_length], labels[:max_length]


def _reference(split: Split, micro_batch: MicroBatch) -> np.ndarray:
    assert split.reference is not None
    return np.asarray(split.reference[[split.row(index) for index in micro_batch.samples]], dtype=np.float32)


def _counted(micro_batch: MicroBatch) -> np.ndarray:
    return np.full(len(micro_batch.samples), 0 if micro_batch.filler else 1, dtype=np.int64)


def padded(ids: Sequence[np.ndarray], labels: Sequence[np.ndarray] | None, pad: int) -> dict[str, np.ndarray]:
    """`input_ids`, `attention_mask` and, where given, `labels`: int64 [rows, longest row rounded up to a multiple of 8]."""
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


def _tensors(arrays: dict[str, np.ndarray]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
