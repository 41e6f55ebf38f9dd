"""Labels, or numbers, of texts and pairs of texts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dstune.config.data_schema import AUTOMATIC
from dstune.data.formats import column_of
from dstune.data.prepared import Split
from dstune.data.rows import normalise
from dstune.data.tokenize import RowTokenizer, Sample
from dstune.inference.predictor import Answer, Predictor
from dstune.inference.rows import Query, Question
from dstune.tasks.classification.rows import Pair
from dstune.trainer.measure import Row


class ClassificationQuestion(Question):
    def row(self, fields: Mapping[str, Any], place: str) -> dict[str, Any]:
        row: dict[str, Any] = {"text": self.text(fields)}
        other = column_of(Pair, "text_pair", self.mapping, fields)
        if self.format in (AUTOMATIC, "pair") and other in fields:
            row["text_pair"] = normalise(fields, "text", {"text": other})["text"]
        if self.task.multi_label:
            return {**row, "labels": []}
        return {**row, "label": 0.0 if self.task.regression else self.labels[0]}


class ClassificationPredictor(Predictor):
    question_class = ClassificationQuestion

    def samples(self, queries: Sequence[Query]) -> list[Sample]:
        rows = [query.row for query in queries]
        fmt = "pair" if any("text_pair" in row for row in rows) else "text_label"
        encode = RowTokenizer(self.tokenizer, self.config.task, fmt, self.longest, self.labels)
        return encode.samples(rows, list(range(len(rows))))

    def answers_from(
        self, split: Split, outputs: list[Row], rows: Sequence[Query], *, all_labels: bool
    ) -> Iterator[Answer]:
        for row in outputs:
            yield self._label(row, all_labels=all_labels)

    def _label(self, row: Row, *, all_labels: bool) -> Answer:
        task: Any = self.config.task
        if task.regression:
            return {"predicted": float(row["prediction"])}
        probability = dict(zip(self.labels, row["probability"].tolist(), strict=True))
        every = {"probabilities": probability} if all_labels else {}
        if task.multi_label:
            predicted = [label for label, on in zip(self.labels, row["prediction"], strict=True) if on]
            return {"predicted": predicted, "probability": {label: probability[label] for label in predicted}, **every}
        label = self.labels[int(row["prediction"])]
        return {"predicted": label, "probability": probability[label], **every}
