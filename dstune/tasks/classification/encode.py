"""Encode classification rows: a text, or a pair of texts, and its label."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import datasets
import numpy as np

from dstune.data.control import ControlTokens
from dstune.data.rows import labels_of
from dstune.data.tokenize.sample import Encoder, Rows, Sample
from dstune.tasks.classification.config import ClassificationConfig


class ClassificationEncoder(Encoder):
    """Encodes texts with the special tokens that the tokenizer puts around and between them.

    The column `label` is the index of the row's label; with `task.multi_label`, a 1 or 0 for each label; in a regression, the
    number itself. With class weights, `loss_weight` is the row's weight.
    """

    def __init__(
        self,
        tokenizer: Any,
        task: ClassificationConfig,
        fmt: str,
        max_length: int,
        labels: tuple[str, ...],
        class_weights: tuple[float, ...],
    ):
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._label_ids = {label: index for index, label in enumerate(labels)}
        self._multi_label = task.multi_label
        self._regression = task.regression
        self._class_weights = class_weights
        # All segments of a single text are 0, even in a batch with pairs: models assume 0 if no segments are given.
        self._with_segments = fmt == "pair" and "token_type_ids" in tokenizer.model_input_names
        self._control = ControlTokens(tokenizer)

    @property
    def columns(self) -> Mapping[str, Any]:
        tokens = datasets.List(datasets.Value("int32"))
        number = datasets.Value("float32" if self._regression else "int64")
        columns = {"label": tokens if self._multi_label else number}
        if self._class_weights:
            columns["loss_weight"] = datasets.Value("float32")
        return columns | ({"token_type_ids": tokens} if self._with_segments else {})

    def __call__(self, rows: Rows, numbers: list[int]) -> list[Sample]:
        texts = [[row[name] for name in ("text", "text_pair") if name in row] for row in rows]
        batch = [tuple(row_texts) if len(row_texts) == 2 else row_texts[0] for row_texts in texts]
        # In a pair, the longer text is truncated first.
        encoded = self._tokenizer(batch, truncation=True, max_length=self._max_length, verbose=False)
        samples = []
        for position, number in enumerate(numbers):
            row_texts = texts[position]
            ids = np.array(encoded["input_ids"][position], dtype=np.int32)
            segments = encoded["token_type_ids"][position] if self._with_segments else None
            length = len(ids)
            if self._control.first(row_texts):
                tokens, segments, length = self._control.sequence(row_texts, self._max_length)
                ids = np.array(tokens, dtype=np.int32)
            elif length == self._max_length:  # perhaps truncated: only then the full text is tokenized to find out
                length = len(self._tokenizer(*row_texts, verbose=False)["input_ids"])
            label = self._label(rows[position])
            columns = {"label": label}
            weight: float = 1
            if self._class_weights:
                weight = columns["loss_weight"] = self._class_weights[label]
            if self._with_segments:
                columns["token_type_ids"] = np.array(
                    segments if len(row_texts) == 2 else [0] * len(ids), dtype=np.int32
                )
            problem = "" if len(ids) else "the text has no token"
            samples.append(Sample(number, ids, columns, weight, length > len(ids), problem, length))
        return samples

    def _label(self, row: dict[str, Any]) -> Any:
        if self._regression:
            return row["label"]
        indices = [self._label_ids[name] for name in labels_of(row)]
        if self._multi_label:
            return np.isin(np.arange(len(self._label_ids)), indices).astype(np.int32)
        (index,) = indices
        return index
