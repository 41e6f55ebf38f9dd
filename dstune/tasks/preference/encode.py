"""Encode judged answers (`kto`) as samples, and collate them into micro-batches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import datasets
import numpy as np
import torch

from dstune.data.batches import blank_samples, counted, padded, reference, rows_with_images
from dstune.data.chat.evidence import Exchange
from dstune.data.collate import NO_TARGET
from dstune.data.images.batch import token_types
from dstune.data.images.places import COLUMN
from dstune.data.preferences import ANSWERS, as_chat
from dstune.data.prepared import Split
from dstune.data.sampler import MicroBatch
from dstune.data.tokenize.conversations import NUMBERS, ChatEncoder
from dstune.data.tokenize.sample import Rows, Sample

NEAR = 16
"""Number of following samples that are searched for an answer to a different prompt."""


class JudgedEncoder(ChatEncoder):
    """Encodes a prompt with an answer that is good or bad; a pair of answers becomes two such samples."""

    one_sample = True

    @property
    def columns(self) -> Mapping[str, Any]:
        return {"labels": NUMBERS, "desirable": datasets.Value("int64"), **self.image_columns}

    def exchanges(self, row: dict[str, Any]) -> list[Exchange]:
        if "chosen" not in row:
            return super().exchanges(row)
        return [self._exchange(as_chat(row, answer), sample=number) for number, answer in enumerate(ANSWERS)]

    def __call__(self, rows: Rows, numbers: list[int]) -> list[Sample]:
        judged: list[tuple[int, dict[str, Any], bool]] = []
        for number, row in zip(numbers, rows, strict=True):
            if "chosen" in row:
                judged += [(number, as_chat(row, answer), answer == "chosen") for answer in ANSWERS]
            else:
                judged.append((number, row, row["desirable"]))
        samples = super().__call__([row for _, row, _ in judged], [number for number, _, _ in judged])
        for sample, (_, _, desirable) in zip(samples, judged, strict=True):
            sample.weight = int(sample.weight > 0)
            sample.columns["desirable"] = int(desirable)
        return samples


def judged_batch(split: Split, micro_batch: MicroBatch, pad: int, max_length: int) -> dict[str, np.ndarray]:
    """Return the arrays of a micro-batch of judged answers.

    `input_ids`, `attention_mask`, `labels` are [rows, sequence]. The same names with the prefix `other_` have an answer to a
    different prompt in place of the row's own. `desirable` and `counted` are [rows], and so are `reference` and `other_reference`
    if the split has them. A split with images adds the model's image inputs, once, and the token types, for both. A micro-batch
    that needs an image and has none gets a last row with a blank one, which does not count.
    """
    samples = [split.sample(index) for index in micro_batch.samples]
    others = [
        _of_another_prompt(split, index, sample) for index, sample in zip(micro_batch.samples, samples, strict=True)
    ]
    blanks = blank_samples(split, micro_batch, samples)
    samples, others = [*samples, *blanks], [*others, *blanks]
    exchanged = [_exchanged(sample, other, max_length) for sample, other in zip(samples, others, strict=True)]
    own = [(sample["input_ids"], sample["labels"]) for sample in samples]
    arrays = rows_with_images(split, own, samples, pad)
    of_others = padded([ids for ids, _ in exchanged], [labels for _, labels in exchanged], pad)
    if split.images is not None:  # images belong to the prompt, so both answers have the same ones
        types = token_types(split, torch.from_numpy(of_others["input_ids"]))
        of_others |= {name: tensor.numpy() for name, tensor in types.items()}
    arrays |= {f"other_{name}": array for name, array in of_others.items()}
    if split.reference is not None:
        logps = reference(split, micro_batch, blanks)
        arrays |= {"reference": logps[:, 0], "other_reference": logps[:, 1]}
    desirable = np.array([sample["desirable"] for sample in samples], dtype=np.int64)
    return {**arrays, "desirable": desirable, "counted": counted(micro_batch, blanks)}


def _of_another_prompt(split: Split, index: int, sample: dict[str, Any]) -> dict[str, Any]:
    """Return the next sample after `index` that has a different prompt and the same verdict, so that the shares of good and bad
    answers stay. If no such sample is near, the verdict may differ. The search is needed because the answers to one prompt are
    next to each other in the data."""
    first: dict[str, Any] | None = None
    for distance in range(1, NEAR + 1):
        other = split.neighbour(index, distance)
        if not _same_prompt(sample, other):
            if other["desirable"] == sample["desirable"]:
                return other
            first = first or other
    return first or split.neighbour(index)


def _same_prompt(sample: dict[str, Any], other: dict[str, Any]) -> bool:
    """Return whether two samples have the same prompt tokens and images; many questions about images differ only in the image."""
    images = [either.get(COLUMN, ()) for either in (sample, other)]
    return np.array_equal(_prompt(sample), _prompt(other)) and np.array_equal(*images)


def _prompt(sample: dict[str, Any]) -> np.ndarray:
    """Return the token ids before the first target."""
    ids: np.ndarray = sample["input_ids"][: int(np.argmax(sample["labels"] != NO_TARGET))]
    return ids


def _exchanged(sample: dict[str, Any], other: dict[str, Any], max_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids and labels of the prompt of `sample` with the answer of `other` (everything from its first target on)."""
    prompt, answer = (len(_prompt(source_sample)) for source_sample in (sample, other))
    ids = np.concatenate([_prompt(sample), other["input_ids"][answer:]])
    labels = np.concatenate([sample["labels"][:prompt], other["labels"][answer:]])
    return ids[:max_length], labels[:max_length]
