"""Turn rows into token ids and targets; the processes of `datasets.map` run this on batches of rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from dstune.data.chat.evidence import Exchange
from dstune.data.collate import refuse_unknown_columns
from dstune.data.formats import shape_of
from dstune.data.images.store import ImageFiles
from dstune.data.render import ChatRenderer
from dstune.data.tokenize.conversations import conversation
from dstune.data.tokenize.multi_task import MultiTaskEncoder
from dstune.data.tokenize.sample import Encoder, Rows, Sample, SourcePrompts
from dstune.protocols import task_of
from dstune.protocols.task import TaskConfig

__all__ = ["COUNTED", "Encoder", "RowTokenizer", "Sample", "conversation"]

COUNTED = {
    "weight": datasets.Value("int64"),
    "number": datasets.Value("int64"),
    "truncated": datasets.Value("bool"),
    "length": datasets.Value("int64"),
    "problem": datasets.Value("string"),
}
"""Columns of `RowTokenizer` that are only counted and not stored with the samples."""


class RowTokenizer:
    """Tokenizes the rows of a run; picklable, so that it can be sent to the processes of `datasets.map`.

    tokenizer: of transformers. max_length: number of tokens kept of a row. labels: label names by index (classification).
    class_weights: weight of a row of each label in the loss; empty if all count the same. several: task and format of each
    source of a mixture, if a run has several tasks. sources: the index of each row's source.
    Control tokens in the text of a row are encoded as text (see `control`).
    Raises UserError (at creation) if the tokenizer lacks something that task and format need.
    """

    def __init__(
        self,
        tokenizer: Any,
        task: TaskConfig,
        fmt: str,
        max_length: int,
        labels: tuple[str, ...] = (),
        class_weights: tuple[float, ...] = (),
        *,
        several: Sequence[tuple[TaskConfig, str]] = (),
        sources: np.ndarray | None = None,
    ):
        self._tokenizer = tokenizer
        self.max_length = max_length
        self._of_source = [
            RowTokenizer(tokenizer, source_tokenizer, own_format, max_length)
            for source_tokenizer, own_format in several
        ]
        self._sources = sources
        self._counted = COUNTED | ({"weight": datasets.Value("float64")} if class_weights else {})
        self._encoder: Encoder
        if self._of_source:
            assert sources is not None, "rows of several tasks come from a mixture"
            self._encoder = MultiTaskEncoder(
                [source_tokenizer._encoder for source_tokenizer in self._of_source], sources
            )
        else:
            self._encoder = task_of(task).encoder(tokenizer, shape_of(fmt), max_length, labels, class_weights)
        self._task = task_of(task)
        refuse_unknown_columns(self._task, self._encoder.columns)

    def use_images(self, images: ImageFiles | None) -> None:
        """Set the files of the images that rows name by number. With images, samples have a column `images`."""
        for tokenizer in (self, *self._of_source):
            tokenizer._encoder.images = images
        refuse_unknown_columns(self._task, self._encoder.columns)

    def __call__(self, batch: dict[str, list]) -> pa.Table:
        """Return a table of samples for `batch` with the columns `row` (JSON text) and `number`; see `table_of`."""
        rows = [json.loads(row) for row in batch["row"]]
        return self.table_of(self.samples(rows, batch["number"]))

    @property
    def features(self) -> datasets.Features:
        """Types of the columns of `table_of`."""
        tokens = datasets.List(datasets.Value("int32"))
        return datasets.Features({"input_ids": tokens, **self._encoder.columns, **self._counted})

    @property
    def later_columns(self) -> frozenset[str]:
        """Columns that are ignored when the content of rows is identified, if no row has a value in them."""
        return self._encoder.later_columns

    def for_row(self, number: int) -> RowTokenizer:
        """Return the tokenizer of row `number`: in a run of several tasks that of the row's source, otherwise this one."""
        return self if self._sources is None or not self._of_source else self._of_source[self._sources[number]]

    def source_of(self, number: int) -> int:
        """Return the index of the source of row `number`; 0 without a mixture."""
        return 0 if self._sources is None else int(self._sources[number])

    def of_source(self, number: int) -> RowTokenizer:
        """Return the tokenizer of source `number`: its own in a run of several tasks, otherwise this one."""
        return self._of_source[number] if self._of_source else self

    @property
    def renderer(self) -> ChatRenderer | None:
        """The renderer of conversations; None if there is no chat template."""
        return self._encoder.renderer

    @property
    def has_conversations(self) -> bool:
        """Whether the rows of at least one task are conversations with trained turns that a chat template renders."""
        return any(
            tokenizer.renderer is not None and not tokenizer._encoder.only_prompts
            for tokenizer in self._of_source or [self]
        )

    def images_of(self, row: dict[str, Any]) -> list[Any]:
        """Return the images of a row as PIL images, in order. Raises RowError."""
        return self._encoder.images_of(row)

    @property
    def trains_on_prompt(self) -> bool:
        """Whether the tokens of prompts are trained too."""
        return self._encoder.trains_on_prompt

    def exchanges(self, row: dict[str, Any]) -> list[Exchange]:
        """Return the conversations of a row, for comparison with its samples."""
        return self._encoder.exchanges(row)

    @property
    def sources(self) -> SourcePrompts | None:
        """Makes the prompts for sources, if rows have a source and a target; otherwise None."""
        return self._encoder.sources

    def plain_prompt_ids(self, text: str) -> list[int]:
        """Return the token ids of a text for the model to continue: with the first special tokens, without an end token."""
        return self._encoder.plain_prompt_ids(text)

    def decode(self, ids: list[int]) -> str:
        """Return the text of `ids` without special tokens."""
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def samples(self, rows: Rows, numbers: list[int]) -> list[Sample]:
        """Return the samples of normalised `rows`, in order. numbers: the number of each row."""
        return self._encoder(rows, numbers)

    def table_of(self, samples: list[Sample]) -> pa.Table:
        """Return `samples` as a table with the columns `input_ids`, those of the task's encoder, and those of COUNTED."""
        columns: dict[str, list[Any]] = {
            "input_ids": [sample.input_ids for sample in samples],
            **{name: [sample.columns[name] for sample in samples] for name in self._encoder.columns},
            "weight": [sample.weight for sample in samples],
            "number": [sample.row for sample in samples],
            "truncated": [sample.truncated for sample in samples],
            "length": [sample.length for sample in samples],
            "problem": [sample.problem for sample in samples],
        }
        schema = self.features.arrow_schema
        return pa.table({name: _column(values, schema.field(name).type) for name, values in columns.items()})


def _column(values: list[Any], kind: pa.DataType) -> pa.Array:
    if not pa.types.is_list(kind):
        return pa.array(values, kind)
    offsets = np.zeros(len(values) + 1, dtype=np.int32)
    np.cumsum([len(array) for array in values], out=offsets[1:])
    flat = np.concatenate(values) if values else np.empty(0)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat.astype(kind.value_type.to_pandas_dtype())))
