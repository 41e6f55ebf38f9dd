"""Encodes documents; every token is a target."""

from __future__ import annotations

import numpy as np

from dstune.data.tokenize.conversations import Language
from dstune.data.tokenize.sample import Rows, Sample


class DocumentEncoder(Language):
    """Documents, cut into pieces of `max_length` tokens that overlap by one token.

    The first token of a piece is no target. It repeats the last token of the previous piece, so each token is a target exactly
    once. Example, max_length 4: tokens a b c d e f </s> give [a b c d] and [d e f </s>].
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
            samples += self._pieces(number, document, np.ones(len(document), dtype=bool), sizes)
        return samples

    def _pieces(self, number: int, ids: np.ndarray, targets: np.ndarray, sizes: np.ndarray) -> list[Sample]:
        samples = []
        for start in range(0, max(len(ids) - 1, 1), self._max_length - 1):
            chunk = slice(start, start + self._max_length)
            sample = self._sample(number, ids[chunk], targets[chunk].copy(), sizes[chunk], "")
            sample.truncated = len(ids) > self._max_length
            sample.length = len(ids)
            samples.append(sample)
        return samples


class TokensEncoder(DocumentEncoder):
    """Documents that are token ids already, as they are: no special token is added. Where a row has labels, only these count.

    `bytes` is 0: which text a token stands for is not known.
    """

    def __call__(self, rows: Rows, numbers: list[int]) -> list[Sample]:
        samples: list[Sample] = []
        vocabulary = len(self._tokenizer)
        for number, row in zip(numbers, rows, strict=True):
            ids = np.array(row["input_ids"], dtype=np.int64)
            outside = ids[(ids < 0) | (ids >= vocabulary)]
            if len(outside):
                problem = f"token id {outside[0]} is not one of the {vocabulary:,} of the model's tokenizer"
                no_ids = np.empty(0, dtype=np.int32)
                samples.append(self._sample(number, no_ids, no_ids > 0, no_ids, problem))
                continue
            targets = np.array(row.get("labels", row["input_ids"])) == ids
            pieces = self._pieces(number, ids.astype(np.int32), targets, np.zeros(len(ids), dtype=np.int64))
            # A piece without a target teaches nothing; a row without any is refused.
            samples += [piece for piece in pieces if piece.weight] or pieces[:1]
        return samples
