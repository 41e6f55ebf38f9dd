"""Encodes words with tags: the first sub-word of a word has the word's tag."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import datasets
import numpy as np

from dstune.data.chat.targets import require_offsets
from dstune.data.collate import NO_TARGET
from dstune.data.control import ControlTokens
from dstune.data.frame import Frame, chunks
from dstune.data.tokenize.sample import Encoder, Rows, Sample
from dstune.tasks.token_classification.config import TokenClassificationConfig, TrainedSubwords


class TokenEncoder(Encoder):
    """Sentences as chunks of sub-words; the label of a word's first sub-word is its tag's index.

    The words are joined by spaces and tokenized as one text, as the pipeline of transformers does with a text. A sentence
    longer than `max_length` becomes several chunks that overlap by `task.stride` sub-words. Each sub-word counts in one of them:
    the first half of an overlap in the earlier chunk, the second half in the later one.
    """

    def __init__(self, tokenizer: Any, task: TokenClassificationConfig, max_length: int, labels: tuple[str, ...]):
        require_offsets(tokenizer)
        self._tokenizer = tokenizer
        self._label_ids = {label: index for index, label in enumerate(labels)}
        self._all = task.subwords is TrainedSubwords.all
        self._frame = Frame.of(tokenizer, 1)
        self._size = max_length - self._frame.size
        self._stride = min(task.stride, self._size // 2)
        self._control = ControlTokens(tokenizer)

    @property
    def columns(self) -> Mapping[str, Any]:
        tokens = datasets.List(datasets.Value("int32"))
        return {"labels": tokens} | ({"word_start": tokens} if self._all else {})

    def __call__(self, rows: Rows, numbers: list[int]) -> list[Sample]:
        texts = [" ".join(row["tokens"]) for row in rows]
        encoded = self._tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        samples: list[Sample] = []
        for number, row, text, ids, offsets in zip(
            numbers, rows, texts, encoded["input_ids"], encoded["offset_mapping"], strict=True
        ):
            if self._control.first(text):
                ids, offsets = self._control.neutral(ids, offsets, text, [])
            samples += self._chunks(number, row, *self._words(row["tokens"], np.array(ids), np.array(offsets)))
        return samples

    def _words(self, words: list[str], ids: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the sub-words of a sentence, and the number of each one's word; -1 for a token of a space between words."""
        ends = np.cumsum([len(word) + 1 for word in words])  # the space behind included
        if len(ids):
            # By the last character, since a token may bring the space in front of its word.
            last = np.maximum(offsets[:, 1] - 1, 0)
            owner = np.searchsorted(ends, last, side="right")
            owner[(last == ends[np.minimum(owner, len(ends) - 1)] - 1) | (offsets[:, 0] == offsets[:, 1])] = -1
        else:
            owner = np.empty(0, dtype=np.int64)
        unknown = self._tokenizer.unk_token_id
        for word in sorted(set(range(len(words))) - set(owner.tolist())):
            # The tokenizer drops some characters; without a sub-word the word would not be measured.
            place = int(np.argmax(owner > word)) if (owner > word).any() else len(owner)
            if unknown is not None:
                ids, owner = np.insert(ids, place, unknown), np.insert(owner, place, word)
        return ids, owner

    def _chunks(self, number: int, row: dict[str, Any], ids: np.ndarray, owner: np.ndarray) -> list[Sample]:
        first = np.zeros(len(ids), dtype=bool)
        first[np.unique(owner, return_index=True)[1]] = True
        first &= owner >= 0
        missing = len(row["tokens"]) - int(first.sum())
        problem = f"{missing} of its words give no token" if missing else ""
        tags = np.array([self._label_ids[tag] for tag in row["tags"]])
        inside = np.array([self._label_ids.get(_inside(tag), self._label_ids[tag]) for tag in row["tags"]])
        labels = np.full(len(ids), NO_TARGET)
        if self._all:
            labels[owner >= 0] = inside[owner[owner >= 0]]
        labels[first] = tags[owner[first]]
        spans = chunks(len(ids), self._size, self._stride, np.flatnonzero(first).tolist())
        # The later chunk takes over in the middle of an overlap.
        edges = [0, *((begin + end) // 2 for (_, end), (begin, _) in pairwise(spans)), len(ids)]
        samples = []
        for chunk, (start, end) in enumerate(spans):
            span = slice(edges[chunk], edges[chunk + 1])
            chunk_labels, starts = np.full(len(ids), NO_TARGET), np.zeros(len(ids))
            chunk_labels[span], starts[span] = labels[span], first[span]
            whole, _, (place,) = self._frame.around([ids[start:end].tolist()])
            columns = {"labels": np.full(len(whole), NO_TARGET)}
            columns["labels"][place : place + end - start] = chunk_labels[start:end]
            if self._all:
                columns["word_start"] = np.zeros(len(whole))
                columns["word_start"][place : place + end - start] = starts[start:end]
            weight = int(np.count_nonzero(columns["labels"] != NO_TARGET))
            length = len(ids) + self._frame.size
            samples.append(Sample(number, np.array(whole), columns, weight, len(spans) > 1, problem, length))
        return samples


def _inside(tag: str) -> str:
    """Return the tag of a word's later sub-words: they continue the entity that the word begins."""
    return f"I-{tag[2:]}" if tag.startswith("B-") else tag
