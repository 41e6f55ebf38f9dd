"""A trained model in memory that answers rows, in one process."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import datasets
import numpy as np
import pyarrow as pa
import torch
from torch import nn

from dstune.config.architectures import row_limit
from dstune.config.data_schema import AUTOMATIC, Padding
from dstune.config.schema import RunConfig
from dstune.data.collate import collate
from dstune.data.prepared import Split
from dstune.data.sampler import evaluation_batches
from dstune.data.tokenize import RowTokenizer, Sample
from dstune.inference.rows import Query, Question
from dstune.models.heads import Head
from dstune.models.heads.base import Batch
from dstune.models.padding import measure_padding, rows_of_proof
from dstune.protocols import task_of
from dstune.trainer.measure import Row

Answer = dict[str, Any]
"""The answer to a row: `predicted`, and further keys of the task (docs/export.md)."""

ANSWERS = (
    "predicted",
    "probability",
    "probabilities",
    "entities",
    "no_answer",
    "vector",
    "score",
    "truncated",
    "problem",
)
"""Names in the answers of built-in tasks."""


@dataclass(frozen=True)
class Predictor:
    """A trained model that answers rows. Tasks define the answers in `answers_from`.

    config: task and data settings, as the model was trained. model: the module to call, on its device and in
    evaluation mode. head: the task's head on that model. labels: the model's labels by index.
    """

    config: RunConfig
    model: nn.Module
    head: Head
    tokenizer: Any
    labels: tuple[str, ...]

    question_class: ClassVar[type[Question]] = Question
    """The class that reads a row."""
    reads_columns: ClassVar[bool] = True
    """Whether batches need more columns of a sample than its tokens."""

    def answers(self, queries: Sequence[Query], batch_size: int, *, all_labels: bool = False) -> list[Answer]:
        """Return the answer to each row, or the `problem` because of which there is none. Rows of similar length are computed
        together, at most `batch_size` at a time.

        all_labels: whether answers contain the probability of every label, or only of the predicted ones.
        """
        return self.answers_of(self.samples(queries), queries, batch_size, all_labels=all_labels)

    def answers_of(
        self, samples: list[Sample], queries: Sequence[Query], batch_size: int, *, all_labels: bool = False
    ) -> list[Answer]:
        """Return the same for rows that are already tokenized samples."""
        problems = {sample.row: sample.problem for sample in samples if sample.problem}
        good = [number for number in range(len(queries)) if number not in problems]
        samples = [sample for sample in samples if sample.row not in problems]
        answers = iter(
            self._answered(samples, [queries[number] for number in good], batch_size, all_labels) if good else ()
        )
        cut = {sample.row for sample in samples if sample.truncated and not task_of(self.config.task).chunked}
        return [
            {"problem": problems[number]}
            if number in problems
            else next(answers) | ({"truncated": True} if number in cut else {})
            for number in range(len(queries))
        ]

    def _answered(
        self, samples: list[Sample], queries: Sequence[Query], batch_size: int, all_labels: bool
    ) -> Iterator[Answer]:
        split = self._split(samples, queries)
        outputs: list[Row] = [{} for _ in samples]
        device = next(self.model.parameters()).device
        for micro_batch in evaluation_batches(
            split.lengths,
            micro_batch_size=batch_size,
            max_length=self.longest,
            packing=False,
            padded=self.pads_rows,
        ):
            batch = collate(split, micro_batch, pad_token_id=self.tokenizer.pad_token_id, packing=False)
            with torch.inference_mode():
                computed = self.computed({name: tensor.to(device) for name, tensor in batch.items()})
            for position, index in enumerate(micro_batch.samples):
                outputs[index] = {name: _array(values[position]) for name, values in computed.items()}
        return self.answers_from(split, outputs, queries, all_labels=all_labels)

    @cached_property
    def pads_rows(self) -> bool:
        """Whether rows of different lengths are computed together. A model that would read the padding gets rows of one length."""
        data = self.config.data
        model: Any = self.model
        if data.padding is not Padding.checked:
            return data.pads_rows
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        rows, padding, device = (
            rows_of_proof(self.tokenizer, base),
            self.tokenizer.pad_token_id,
            next(model.parameters()).device,
        )
        return not measure_padding(base, model, rows, padding, device).reads_padding

    # -- rows to samples

    @cached_property
    def longest(self) -> int:
        """Maximum tokens of a row: as in training, and at most the model's positions."""
        model: Any = self.model
        limit, longest = row_limit(model.config.to_dict()), self.config.data.max_length
        adapter = getattr(model, "peft_config", {}).get("default")
        trained_prompt = getattr(adapter, "num_virtual_tokens", None) or 0
        return longest if limit is None else min(longest, limit - trained_prompt)

    def samples(self, queries: Sequence[Query]) -> list[Sample]:
        """Return the samples of all rows, in order; a row may have several."""
        encode = RowTokenizer(self.tokenizer, self.config.task, AUTOMATIC, self.longest, self.labels)
        return encode.samples([query.row for query in queries], list(range(len(queries))))

    def _split(self, samples: Sequence[Sample], queries: Sequence[Query]) -> Split:
        """Return the samples as a `Split`, which `collate` and the metrics of evaluations read."""
        columns = {"input_ids": [sample.input_ids for sample in samples]}
        if self.reads_columns:
            names = dict.fromkeys(name for sample in samples for name in sample.columns)
            columns |= {name: [self._column(sample, name) for sample in samples] for name in names}
        texts = None
        if task_of(self.config.task).metrics_read_rows:
            texts = datasets.Dataset(pa.table({"row": [json.dumps(query.row) for query in queries]}))
        return Split(
            "asked",
            datasets.Dataset(pa.table(columns)),
            lengths=np.array([len(sample.input_ids) for sample in samples]),
            weights=np.ones(len(samples), dtype=np.int64),
            origins=np.unique([sample.row for sample in samples], return_inverse=True)[1].astype(np.int32),
            texts=texts,
        )

    @staticmethod
    def _column(sample: Sample, name: str) -> Any:
        """Return a column of a sample. If texts and pairs are answered together, texts have no column of segments: all of their
        tokens are in segment 0."""
        return sample.columns.get(name, np.zeros(len(sample.input_ids), dtype=np.int32))

    # -- samples to answers

    def computed(self, batch: Batch) -> Mapping[str, Any]:
        """Return the outputs that the answers need for each sample of a batch, by name."""
        return self.head(self.model, batch).rows

    def answers_from(
        self, split: Split, outputs: list[Row], rows: Sequence[Query], *, all_labels: bool
    ) -> Iterator[Answer]:
        """Yield the answer to each row. outputs: the outputs of `computed` for each sample."""
        raise NotImplementedError


def _array(values: torch.Tensor) -> np.ndarray:
    values = values.cpu()
    return (values.float() if values.is_floating_point() else values).numpy()
