"""Encodes contrastive pairs: a text, one that belongs to it, and any number of texts that do not."""

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
from dstune.tasks.embedding.rows import texts_of

TOKENS = datasets.List(datasets.Value("int32"))
COLUMNS = {"anchor": "input_ids", "positive": "positive_input_ids", "negative": "negative_input_ids"}
"""Column of each kind of text; the tokens of all negatives of a pair are one list."""
LENGTHS = "negative_lengths"
"""Column with the number of tokens of each negative; empty if there is at most one."""


class ContrastiveEncoder(Encoder):
    """Encodes texts with their special tokens, each cut to `max_length` tokens.

    A row with several positives becomes a sample for each; the negatives are distributed among them in turn.
    """

    def __init__(self, tokenizer: Any, max_length: int):
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._control = ControlTokens(tokenizer)

    later_columns = frozenset({LENGTHS})

    @property
    def columns(self) -> Mapping[str, Any]:
        return {"positive_input_ids": TOKENS, "negative_input_ids": TOKENS, LENGTHS: TOKENS}

    def __call__(self, rows: Rows, numbers: list[int]) -> list[Sample]:
        return [sample for number, row in zip(numbers, rows, strict=True) for sample in self._samples(number, row)]

    def _samples(self, number: int, row: dict[str, Any]) -> list[Sample]:
        anchor, length = self._tokens(row["anchor"])
        if "positive" not in row:  # a text of `dstune predict`
            columns = dict.fromkeys(self.columns, np.empty(0, np.int32))
            problem = "" if len(anchor) else "a text has no token"
            return [Sample(number, anchor, columns, 1, length > self._max_length, problem, length)]
        positives, negatives = texts_of(row["positive"]), texts_of(row.get("negative"))
        samples = []
        for turn, positive in enumerate(positives):
            encoded = [self._tokens(text) for text in (positive, *negatives[turn :: len(positives)])]
            longest = max(length, *(token_count for _, token_count in encoded))
            (tokens, _), *encoded_negatives = encoded
            lengths = [len(ids) for ids, _ in encoded_negatives]
            columns = {
                "positive_input_ids": tokens,
                "negative_input_ids": np.concatenate([np.empty(0, np.int32), *(ids for ids, _ in encoded_negatives)]),
                LENGTHS: np.array(lengths if len(lengths) > 1 else [], dtype=np.int32),
            }
            problem = (
                "" if all(map(len, (anchor, tokens, *(ids for ids, _ in encoded_negatives)))) else "a text has no token"
            )
            samples.append(Sample(number, anchor, columns, 1, longest > self._max_length, problem, longest))
        return samples

    def _tokens(self, text: str) -> tuple[np.ndarray, int]:
        """Return the tokens of `text`, and their number before the cut."""
        if self._control.first(text):
            ids, _, length = self._control.sequence([text], self._max_length)
            return np.array(ids, dtype=np.int32), length
        ids = self._tokenizer(text, verbose=False)["input_ids"]
        if len(ids) > self._max_length:
            cut_ids = self._tokenizer(text, truncation=True, max_length=self._max_length, verbose=False)["input_ids"]
            return np.array(cut_ids, dtype=np.int32), len(ids)
        return np.array(ids, dtype=np.int32), len(ids)


def contrastive_batch(split: Split, micro_batch: MicroBatch, pad: int) -> dict[str, np.ndarray]:
    """Return `input_ids`, `attention_mask` [texts, sequence]: anchors, positives, and the negatives of the pairs that have one,
    whose numbers are `negative_owner`; `anchor_key`, `positive_key`, `negative_key`, equal for equal texts; `counted` [pairs]."""
    samples = [split.sample(index) for index in micro_batch.samples]
    texts = {kind: [sample[name] for sample in samples] for kind, name in COLUMNS.items() if kind != "negative"}
    of_pairs = [np.split(sample[COLUMNS["negative"]], np.cumsum(sample[LENGTHS])[:-1]) for sample in samples]
    negatives = [[ids for ids in of_pair if len(ids)] for of_pair in of_pairs]
    owners = [number for number, of_pair in enumerate(negatives) for _ in of_pair]
    texts["negative"] = [ids for of_pair in negatives for ids in of_pair]
    keys = {
        f"{kind}_key": np.array([_key(ids) for ids in ids_of_kind], dtype=np.int64)
        for kind, ids_of_kind in texts.items()
    }
    arrays = padded([ids for ids_of_kind in texts.values() for ids in ids_of_kind], None, pad)
    return {**arrays, **keys, "negative_owner": np.array(owners, dtype=np.int64), "counted": counted(micro_batch)}


def _key(ids: np.ndarray) -> int:
    """Return a signed number of 64 bits that is equal for equal tokens."""
    return xxhash.xxh3_64_intdigest(np.asarray(ids, dtype=np.int32).tobytes()) - 2**63
