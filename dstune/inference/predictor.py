"""A trained model in memory that answers rows, in one process."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from torch import nn

from dstune.config.architectures import row_limit
from dstune.config.data_schema import AUTOMATIC
from dstune.config.schema import RunConfig
from dstune.config.task_schema import (
    ClassificationConfig,
    EmbeddingConfig,
    QuestionAnsweringConfig,
    RewardConfig,
    TokenClassificationConfig,
)
from dstune.data.collate import collate
from dstune.data.prepared import Split
from dstune.data.sampler import MicroBatch
from dstune.data.tags import AS_BIO, OUTSIDE, marks_entities
from dstune.data.tokenize import RowTokenizer, Sample
from dstune.inference.rows import Asked
from dstune.models.heads import Head
from dstune.models.heads.base import Batch, inputs_of
from dstune.protocols import task_of
from dstune.tasks.embedding.head import pooled
from dstune.tasks.question_answering.metrics import best_spans
from dstune.tasks.reward.encode import RewardEncoder
from dstune.train.measure import Row, rows_of

Answer = dict[str, Any]
"""What a row gets: `predicted` and what the task adds, see docs/export.md."""

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
"""All names that an answer may have."""


@dataclass(frozen=True)
class Predictor:
    """A trained model that answers rows.

    config: task and data settings, as the model was trained. model: what is called, on its device, in evaluation mode.
    head: of the task, on that model. labels: of the model, in their order.
    """

    config: RunConfig
    model: nn.Module
    head: Head
    tokenizer: Any
    labels: tuple[str, ...]

    def answers(self, asked: Sequence[Asked], batch_size: int, *, all_labels: bool = False) -> list[Answer]:
        """The answer to each row, or the `problem` that it has none for. Rows of about the same length are computed
        together, at most `batch_size` at a time.

        all_labels: the probability of every label, not only of those that were predicted.
        """
        samples = self._samples(asked)
        problems = {sample.row: sample.problem for sample in samples if sample.problem}
        good = [number for number in range(len(asked)) if number not in problems]
        samples = [sample for sample in samples if sample.row not in problems]
        found = iter(
            self._answered(samples, [asked[number] for number in good], batch_size, all_labels) if good else ()
        )
        cut = {sample.row for sample in samples if sample.truncated and not task_of(self.config.task).chunked}
        return [
            {"problem": problems[number]}
            if number in problems
            else next(found) | ({"truncated": True} if number in cut else {})
            for number in range(len(asked))
        ]

    def _answered(
        self, samples: list[Sample], asked: Sequence[Asked], batch_size: int, all_labels: bool
    ) -> Iterator[Answer]:
        order = np.argsort([-len(sample.input_ids) for sample in samples], kind="stable")
        split = self._split(samples, asked)
        kept: list[Row] = [{} for _ in samples]
        device = next(self.model.parameters()).device
        for start in range(0, len(order), batch_size):
            chosen = [int(index) for index in order[start : start + batch_size]]
            micro_batch = MicroBatch(0, tuple((index,) for index in chosen))
            batch = collate(split, micro_batch, pad_token_id=self.tokenizer.pad_token_id, packing=False)
            with torch.inference_mode():
                found = self._computed({name: tensor.to(device) for name, tensor in batch.items()})
            for position, index in enumerate(chosen):
                kept[index] = {name: _array(values[position]) for name, values in found.items()}
        return self._told(split, kept, asked, all_labels)

    # -- rows to samples

    @cached_property
    def _longest(self) -> int:
        """Tokens of a row: as in training, and no more than the model has positions for."""
        model: Any = self.model
        limit, longest = row_limit(model.config.to_dict()), self.config.data.max_length
        adapter = getattr(model, "peft_config", {}).get("default")
        trained_prompt = getattr(adapter, "num_virtual_tokens", None) or 0
        return longest if limit is None else min(longest, limit - trained_prompt)

    def _samples(self, asked: Sequence[Asked]) -> list[Sample]:
        rows, numbers = [one.row for one in asked], list(range(len(asked)))
        task, longest = self.config.task, self._longest
        if isinstance(task, RewardConfig):
            fmt = "messages" if any("messages" in row for row in rows) else "preference"
            samples = RewardEncoder(self.tokenizer, task.template_date, fmt, longest).of_answers(rows, numbers)
            for sample in samples:
                if not sample.problem and not sample.weight:
                    sample.problem = f"its prompt alone has {longest} tokens (data.max_length)"
            return samples
        if not isinstance(task, ClassificationConfig):
            return RowTokenizer(self.tokenizer, task, AUTOMATIC, longest, self.labels).samples(rows, numbers)
        samples = []
        for fmt in ("text_label", "pair"):  # a tokenizer takes texts or pairs, never both at once
            own = [number for number in numbers if ("text_pair" in rows[number]) == (fmt == "pair")]
            if own:
                encode = RowTokenizer(self.tokenizer, task, fmt, longest, self.labels)
                samples += encode.samples([rows[number] for number in own], own)
        return sorted(samples, key=lambda sample: sample.row)

    def _split(self, samples: Sequence[Sample], asked: Sequence[Asked]) -> Split:
        """The samples as what `collate` and the metrics of evaluations read."""
        columns = {"input_ids": [sample.input_ids for sample in samples]}
        if not isinstance(self.config.task, RewardConfig | EmbeddingConfig):
            names = dict.fromkeys(name for sample in samples for name in sample.columns)
            columns |= {name: [self._column(sample, name) for sample in samples] for name in names}
        texts = None
        if isinstance(self.config.task, QuestionAnsweringConfig):
            texts = datasets.Dataset(pa.table({"row": [json.dumps(one.row) for one in asked]}))
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
        """Where texts and pairs meet, those of texts are told of no segments: all of theirs are the first."""
        return sample.columns.get(name, np.zeros(len(sample.input_ids), dtype=np.int32))

    # -- samples to answers

    def _computed(self, batch: Batch) -> Mapping[str, Any]:
        """What the answers need of each sample of a batch, by name."""
        match self.config.task:
            case EmbeddingConfig(pooling=pooling):
                hidden = self.model(**inputs_of(batch)).last_hidden_state
                return {"vector": pooled(hidden, batch["attention_mask"], pooling)}
            case RewardConfig():
                return {"score": self.model(**inputs_of(batch)).logits.float()[:, 0]}
        return self.head(self.model, batch).rows

    def _told(self, split: Split, kept: list[Row], asked: Sequence[Asked], all_labels: bool) -> Iterator[Answer]:
        match self.config.task:
            case ClassificationConfig() as task:
                for row in kept:
                    yield self._label(task, row, all_labels)
            case TokenClassificationConfig() as task:
                marked = marks_entities(self.labels, task.scheme)
                for one, windows in zip(asked, rows_of(split, kept), strict=True):
                    tags = [self.labels[index] for window in windows for index in window["prediction"]]
                    words = one.row["tokens"]
                    yield {"tokens": words, "predicted": tags} | ({"entities": entities(words, tags)} if marked else {})
            case QuestionAnsweringConfig() as task:
                for span, margin in zip(*best_spans(split, kept), strict=True):
                    absent = task.no_answer and margin > task.threshold
                    yield {"predicted": "" if absent else span} | ({"no_answer": margin} if task.no_answer else {})
            case _:
                (name,) = kept[0]
                for row in kept:
                    yield {name: row[name].tolist()}

    def _label(self, task: ClassificationConfig, row: Row, all_labels: bool) -> Answer:
        if task.regression:
            return {"predicted": float(row["prediction"])}
        probability = dict(zip(self.labels, row["probability"].tolist(), strict=True))
        every = {"probabilities": probability} if all_labels else {}
        if task.multi_label:
            found = [label for label, on in zip(self.labels, row["prediction"], strict=True) if on]
            return {"predicted": found, "probability": {label: probability[label] for label in found}, **every}
        label = self.labels[int(row["prediction"])]
        return {"predicted": label, "probability": probability[label], **every}


def _array(values: torch.Tensor) -> np.ndarray:
    values = values.cpu()
    return (values.float() if values.is_floating_point() else values).numpy()


def entities(words: Sequence[str], tags: Sequence[str]) -> list[dict[str, Any]]:
    """The entities that `tags` mark (BIO, BIOES, BILOU): `type`, `text`, and `start` and `end` (exclusive), the numbers of
    their words.

    A tag that continues no entity of its type begins one, as metrics of entities count it.
    """
    found: list[dict[str, Any]] = []
    before = OUTSIDE
    for number, tag in enumerate(tags):
        mark, _, kind = tag.partition("-")
        if tag != OUTSIDE:
            if AS_BIO.get(mark, mark) == "I" and before == kind:
                found[-1]["end"] = number + 1
            else:
                found.append({"type": kind, "text": "", "start": number, "end": number + 1})
        before = kind if tag != OUTSIDE and mark not in ("S", "U", "E", "L") else OUTSIDE
    return [one | {"text": " ".join(words[one["start"] : one["end"]])} for one in found]
