"""Rows without labels: texts of the command line, of standard input or of files, each checked before a model is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from dstune.config.data_schema import DataFormat
from dstune.config.task_schema import (
    ChatConfig,
    ClassificationConfig,
    EmbeddingConfig,
    QuestionAnsweringConfig,
    RewardConfig,
    TagScheme,
    TaskConfig,
    TokenClassificationConfig,
)
from dstune.data import sources
from dstune.data.files import DOCUMENTS
from dstune.data.formats import column_of, listing
from dstune.data.rows import RowError, normalise, recognise
from dstune.data.tags import OUTSIDE
from dstune.errors import Problem, UserError

MOST_TOLD = 10
"""Bad rows that are named; the others are counted."""


@dataclass(frozen=True)
class Asked:
    """One row to be answered."""

    place: str
    """FILE:LINE, or which `--text` it is."""
    fields: Mapping[str, Any]
    """The row as it was given."""
    row: dict[str, Any]
    """As the task's encoder reads it, with a label that means nothing where it needs one."""


class Question:
    """What a task wants to know of a row: everything that its training rows have but the answer.

    labels: of the model, in their order. mapping: `data.columns`.
    """

    def __init__(self, task: TaskConfig, labels: Sequence[str], mapping: Mapping[str, str]):
        self._task = task
        self._labels = labels
        self._mapping = mapping

    @property
    def column(self) -> str | None:
        """The column that a bare text is; None where a row is more than a text."""
        match self._task:
            case ClassificationConfig() | EmbeddingConfig():
                return self._mapping.get("text", "text")
            case TokenClassificationConfig():
                return self._mapping.get("tokens", "tokens")
        return None

    def of(self, fields: Mapping[str, Any], place: str) -> Asked:
        """Raises RowError."""
        match self._task:
            case ClassificationConfig():
                row = self._classified(fields)
            case TokenClassificationConfig():
                row = self._tagged(fields)
            case QuestionAnsweringConfig():
                unanswered = {**fields, column_of("answers", self._mapping, fields): []}
                row = normalise(unanswered, DataFormat.squad, self._mapping, replace(self._task, no_answer=True))
            case EmbeddingConfig():
                row = {"anchor": normalise(fields, DataFormat.text, self._mapping)["text"]}
            case RewardConfig():
                row = self._judged(fields, place)
            case _:
                raise AssertionError(f"{self._task.name} writes text")
        return Asked(place, fields, row)

    def _classified(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        assert isinstance(self._task, ClassificationConfig)
        pair = column_of("text_pair", self._mapping, fields) in fields
        row = normalise(fields, DataFormat.text, self._mapping)
        if pair:
            other = {"text": column_of("text_pair", self._mapping, fields)}
            row["text_pair"] = normalise(fields, DataFormat.text, other)["text"]
        if self._task.multi_label:
            return {**row, "labels": []}
        return {**row, "label": 0.0 if self._task.regression else self._labels[0]}

    def _tagged(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        assert isinstance(self._task, TokenClassificationConfig)
        column = column_of("tokens", self._mapping, fields)
        if column not in fields and "text" in fields:
            column = "text"
        if column not in fields:
            raise RowError(f"missing column {column!r}, the columns here are {listing(fields)}")
        words = fields[column].split() if isinstance(fields[column], str) else fields[column]
        tag = OUTSIDE if OUTSIDE in self._labels else self._labels[0]
        tags = [tag] * len(words) if isinstance(words, list) else [tag]
        tagged = {"tokens": words, "tags": tags}
        return normalise(tagged, DataFormat.tokens_tags, {}, replace(self._task, scheme=TagScheme.plain))

    def _judged(self, fields: Mapping[str, Any], place: str) -> dict[str, Any]:
        try:
            fmt = recognise(fields, self._mapping, DataFormat.auto, ChatConfig(), place)
        except UserError:
            expected = "'messages', or 'prompt' and 'completion'"
            raise RowError(f"a reward is of {expected}; the columns here are {listing(fields)}") from None
        return normalise(fields, fmt, self._mapping, ChatConfig())


class Rows:
    """The rows to be answered, in order; read anew at each pass, so that they need not fit into memory.

    Raises UserError (at creation) with every row that cannot be answered, the first MOST_TOLD by name.
    """

    def __init__(self, question: Question, texts: Sequence[str] = (), spec: str | None = None):
        """texts: of `--text`. spec: what `--input` says, as `data.train` does: a file, a folder, a glob, a data set of the hub."""
        self._question = question
        if texts and question.column is None:
            reason = "a row of this task is more than a text"
            raise UserError(
                Problem("--text", reason, "--input FILE with the columns of the training rows, without labels")
            )
        self._texts = [(f"--text {number}", {question.column or "text": text}) for number, text in enumerate(texts, 1)]
        self.files = [] if spec is None else sources.expand(spec, "--input", split="test")
        self.count = self._check()

    def blocks(self, size: int, skip: int = 0) -> Iterator[list[Asked]]:
        """The rows behind the first `skip` ones, `size` at a time."""
        rows = (self._question.of(fields or {}, place) for place, fields, _ in islice(self._given(), skip, None))
        while block := list(islice(rows, size)):
            yield block

    def _given(self) -> Iterator[tuple[str, Mapping[str, Any] | None, str]]:
        """Place, fields and what is wrong with each row."""
        for place, fields in self._texts:
            yield place, fields, ""
        for file in self.files:
            for raw in sources.read(file):
                yield raw.place, self._of_text(file, raw.fields), raw.error

    def _of_text(self, file: sources.DataFile, fields: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
        """A line of plain text is the column that a text is, whatever the run calls it."""
        column = self._question.column
        if fields is None or column is None or set(fields) != {"text"} or file.ending not in DOCUMENTS:
            return fields
        return {column: fields["text"]}

    def _check(self) -> int:
        count, bad = 0, 0
        told: list[Problem] = []
        for place, fields, error in self._given():
            count += 1
            try:
                if fields is None:
                    raise RowError(error)
                self._question.of(fields, place)
            except RowError as problem:
                bad += 1
                if len(told) < MOST_TOLD:
                    told.append(Problem(place, str(problem)))
        if bad > len(told):
            told.append(Problem("--input", f"and {bad - len(told):,} more rows cannot be answered"))
        if told:
            raise UserError(told)
        if not count:
            raise UserError(Problem("--input", "there are no rows in it"))
        return count
