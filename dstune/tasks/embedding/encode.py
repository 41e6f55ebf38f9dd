"""Samples of contrastive pairs: a text, one that belongs to it, and perhaps one that does not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import datasets
import numpy as np
import xxhash

from dstune.data.batches import counted, padded
from dstune.data.control import ControlTokens
from dstune.data.prepared import Split
from dstune.data.sampler import MicroBatch
from dstune.data.tokenize.sample import Encoder, Rows, Sample

TOKENS = datasets.List(datasets.Value("int32"))
COLUMNS = {"anchor": "input_ids", "positive": "positive_input_ids", "negative": "negative_input_ids"}
"""Where the tokens of each text of a row go; those of a negative that a row does not have are empty."""


class ContrastiveEncoder(Encoder):
    """Texts with the special tokens that the tokenizer puts around them, each cut to `max_length` tokens."""

    def __init__(self, tokenizer: Any, max_length: int):
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._control = ControlTokens(tokenizer)

    @property
    def columns(self) -> Mapping[str, Any]:
        return {"positive_input_ids": TOKENS, "negative_input_ids": TOKENS}

    def __call__(self, rows: Rows, numbers: list[int]) -> list[Sample]:
        samples = []
        for number, row in zip(numbers, rows, strict=True):
            encoded = {column: self._tokens(row[name]) for name, column in COLUMNS.items() if name in row}
            ids = {column: tokens for column, (tokens, _) in encoded.items()}
            columns = {column: ids.get(column, np.empty(0, dtype=np.int32)) for column in self.columns}
            length = max(length for _, length in encoded.values())
            problem = "" if all(len(tokens) for tokens in ids.values()) else "a text has no token"
            truncated = length > self._max_length
            samples.append(Sample(number, ids["input_ids"], columns, 1, truncated, problem, length))
        return samples

    def _tokens(self, text: str) -> tuple[np.ndarray, int]:
        """Tokens of `text`, and how many there were before it was cut."""
        if self._control.first(text):
            ids, _, length = self._control.sequence([text], self._max_length)
            return np.array(ids, dtype=np.int32), length
        ids = self._tokenizer(text, verbose=False)["input_ids"]
        if len(ids) > self._max_length:
            kept = self._tokenizer(text, truncation=True, max_length=self._max_length, verbose=False)["input_ids"]
            return np.array(kept, dtype=np.int32), len(ids)
        return np.array(ids, dtype=np.int32), len(ids)


def contrastive_batch(split: Split, micro_batch: MicroBatch, pad: int) -> dict[str, np.ndarray]:
    """`input_ids`, `attention_mask` [texts, sequence]: anchors, positives, and the negatives of the pairs that have one,
    whose numbers are `negative_owner`; `anchor_key`, `positive_key`, `negative_key`, equal for equal texts; `counted`
    [pairs]."""
    samples = [split.sample(index) for index in micro_batch.samples]
    texts = {kind: [sample[name] for sample in samples] for kind, name in COLUMNS.items()}
    owners = [number for number, tokens in enumerate(texts["negative"]) if len(tokens)]
    texts["negative"] = [texts["negative"][owner] for owner in owners]
    keys = {f"{kind}_key": np.array([_key(ids) for ids in of], dtype=np.int64) for kind, of in texts.items()}
    arrays = padded([ids for of in texts.values() for ids in of], None, pad)
    return {**arrays, **keys, "negative_owner": np.array(owners, dtype=np.int64), "counted": counted(micro_batch)}


def _key(ids: np.ndarray) -> int:
    """Equal for equal tokens; a signed number of 64 bits."""
    return xxhash.xxh3_64_intdigest(np.asarray(ids, dtype=np.int32).tobytes()) - 2**63
