"""Answers to questions as spans of their texts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from dstune.data.formats import column_of
from dstune.data.prepared import Split
from dstune.data.rows import normalise
from dstune.inference.predictor import Answer, Predictor
from dstune.inference.rows import Query, Question
from dstune.tasks.question_answering.metrics import best_spans
from dstune.tasks.question_answering.rows import Squad
from dstune.trainer.measure import Row


class QuestionAboutText(Question):
    role = "context"
    text_column = None

    def row(self, fields: Mapping[str, Any], place: str) -> dict[str, Any]:
        unanswered = {**fields, column_of(Squad, "answers", self.mapping, fields): []}
        row: dict[str, Any] = normalise(unanswered, "squad", self.mapping, replace(self.task, no_answer=True))
        return row


class AnswerPredictor(Predictor):
    question_class = QuestionAboutText

    def answers_from(
        self, split: Split, outputs: list[Row], rows: Sequence[Query], *, all_labels: bool
    ) -> Iterator[Answer]:
        task: Any = self.config.task
        for span, margin in zip(*best_spans(split, outputs), strict=True):
            absent = task.no_answer and margin > task.threshold
            yield {"predicted": "" if absent else span} | ({"no_answer": margin} if task.no_answer else {})
