"""Samples of documents: every token is a target."""

from __future__ import annotations

import numpy as np

from dstune.data.tokenize.conversations import Language
from dstune.data.tokenize.sample import Rows, Sample


class DocumentEncoder(Language):
    """Documents, cut into pieces of `max_length` tokens that overlap by one token.

    The first token of a piece is no target, so it is the last one of the piece before: no target is lost and
    none counts twice. Example, max_length 4: tokens a b c d e f </s> give [a b c d] and [d e f </s>].
    """

    def __call__(self, rows: Rows, numbers: list[int]) -> list[Sample]:
        encoded = self._tokenizer(
            [row["text"] for row in rows],
            add_special_tokens=False,
            return_offsets_mapping=self._tokenizer.is_fast,
            verbose=False,
        )
        places = encoded.get("offset_mapping", [[]] * len(rows))
        end = self._tokenizer.eos_token_id
        samples = []
        for number, row, ids, offsets in zip(numbers, rows, encoded["input_ids"], places, strict=True):
            text = row["text"]
            if self._control.first(row):
                ids, offsets = self._control.encode(text, self._own_tokens(text, self._tokenizer.eos_token))
            prefix, suffix = self._missing_prefix(ids), [] if ids[-1:] == [end] else [end]
            document = np.array([*prefix, *ids, *suffix], dtype=np.int32)
            sizes = np.zeros(len(document), dtype=np.int64)
            sizes[len(prefix) : len(prefix) + len(ids)] = self._sizes(np.array(ids), offsets, text)
            step = self._max_length - 1
            for start in range(0, max(len(document) - 1, 1), step):
                chunk = slice(start, start + self._max_length)
                piece = document[chunk]
                sample = self._sample(number, piece, np.ones(len(piece), dtype=bool), sizes[chunk], "")
                sample.truncated = len(document) > self._max_length
                sample.length = len(document)
                samples.append(sample)
        return samples
