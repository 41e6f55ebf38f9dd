"""Samples of judged answers, and the micro-batches of preferences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import datasets
import numpy as np

from dstune.data.batches import counted, padded, reference
from dstune.data.chat.evidence import Exchange
from dstune.data.collate import NO_TARGET
from dstune.data.preferences import ANSWERS, as_chat
from dstune.data.prepared import Split
from dstune.data.sampler import MicroBatch
from dstune.data.tokenize.conversations import ChatEncoder
from dstune.data.tokenize.pairs import TOKENS
from dstune.data.tokenize.sample import Rows, Sample

NEAR = 16
"""Samples behind one among which the answer to another prompt is looked for."""


class JudgedEncoder(ChatEncoder):
    """A prompt with an answer that is good or bad; of a pair of answers two such samples."""

    one_sample = True

    @property
    def columns(self) -> Mapping[str, Any]:
        return {"labels": TOKENS, "desirable": datasets.Value("int64")}

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
    """Return `input_ids`, `attention_mask`, `labels` [rows, sequence]; the same after `other_` with an answer to another prompt
    in place of the row's own; `desirable` and `counted` [rows]; `reference`, `other_reference` [rows] where the split has them."""
    samples = [split.sample(index) for index in micro_batch.samples]
    others = [
        _of_another_prompt(split, index, sample) for index, sample in zip(micro_batch.samples, samples, strict=True)
    ]
    exchanged = [_exchanged(sample, other, max_length) for sample, other in zip(samples, others, strict=True)]
    arrays = padded([sample["input_ids"] for sample in samples], [sample["labels"] for sample in samples], pad)
    mismatched = padded([ids for ids, _ in exchanged], [labels for _, labels in exchanged], pad)
    arrays |= {f"other_{name}": array for name, array in mismatched.items()}
    if split.reference is not None:
        logps = reference(split, micro_batch)
        arrays |= {"reference": logps[:, 0], "other_reference": logps[:, 1]}
    desirable = np.array([sample["desirable"] for sample in samples], dtype=np.int64)
    return {**arrays, "desirable": desirable, "counted": counted(micro_batch)}


def _of_another_prompt(split: Split, index: int, sample: dict[str, Any]) -> dict[str, Any]:
    """Return the next sample behind `index` with another prompt, since the answers to one stand together in the data, and as
    good or bad an answer, so that the shares of both stay; without the latter where none is near."""
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
    """Return everything in front of the first target."""
    ids: np.ndarray = sample["input_ids"][: int(np.argmax(sample["labels"] != NO_TARGET))]
    return ids


def _exchanged(sample: dict[str, Any], other: dict[str, Any], max_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the prompt of `sample` with the answer of `other`, which is everything from its first target on; ids and labels."""
    prompt, answer = (len(_prompt(source_sample)) for source_sample in (sample, other))
    ids = np.concatenate([_prompt(sample), other["input_ids"][answer:]])
    labels = np.concatenate([sample["labels"][:prompt], other["labels"][answer:]])
    return ids[:max_length], labels[:max_length]
