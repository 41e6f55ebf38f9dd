"""Rows without labels: texts of the command line, of standard input or of files, each checked before a model is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from dstune.config.data_schema import AUTOMATIC, DataConfig, OnBadRow
from dstune.config.task_schema import (
    ChatConfig,
    ClassificationConfig,
    EmbeddingConfig,
    QuestionAnsweringConfig,
    RewardConfig,
    TagScheme,
    TokenClassificationConfig,
)
from dstune.data import sources
from dstune.data.files import DOCUMENTS
from dstune.data.formats import column_of, listing
from dstune.data.rows import RowError, canonical, normalise, recognise
from dstune.data.tags import OUTSIDE
from dstune.errors import Problem, UserError
from dstune.protocols.task import TaskConfig

MOST_TOLD = 10
"""Bad rows that are named; the others are counted."""

Given = tuple[str, Mapping[str, Any] | None, str]
"""Place (FILE:LINE, or which `--text` it is), columns, and what is wrong where they could not be read."""


@dataclass(frozen=True)
class Asked:
    """One row to be answered."""

    place: str
    fields: Mapping[str, Any]
    """The row as it was given."""
    row: dict[str, Any]
    """As the task's encoder reads it, with a label that means nothing where it needs one."""


class Question:
    """What a task wants to know of a row: everything that its training rows have but the answer.

    labels: of the model, in their order. data: `columns` and `format` as in training.
    """

    def __init__(self, task: TaskConfig, labels: Sequence[str], data: DataConfig):
        self._task = task
        self._labels = labels
        self._mapping = data.columns
        self._pairs = data.format in (AUTOMATIC, "pair")

    @property
    def role(self) -> str:
        """What `data.columns` calls what a row is about."""
        match self._task:
            case TokenClassificationConfig():
                return "tokens"
            case QuestionAnsweringConfig():
                return "context"
        return "text"

    @property
    def text_column(self) -> str | None:
        """The column that a bare text is; None where a row is more than a text."""
        match self._task:
            case ClassificationConfig():
                return self._mapping.get("text", "text")
            case EmbeddingConfig():
                return self._mapping.get("text", self._mapping.get("anchor", "text"))
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
                row = normalise(unanswered, "squad", self._mapping, replace(self._task, no_answer=True))
            case EmbeddingConfig():
                row = {"anchor": self._text(fields)}
            case RewardConfig():
                row = self._judged(fields, place)
            case _:
                raise AssertionError(f"{self._task.name} writes text")
        canonical(row)  # what UTF-8 cannot hold, a tokenizer cannot read
        return Asked(place, fields, row)

    def _text(self, fields: Mapping[str, Any]) -> str:
        """What `text` is called, or in rows as those of the training of embeddings `anchor`."""
        names = ["text", "anchor"] if isinstance(self._task, EmbeddingConfig) else ["text"]
        column = next((own for name in names if (own := self._mapping.get(name, name)) in fields), None)
        if column is None:
            raise RowError(self._missing(names[0], fields))
        text: str = normalise(fields, "text", {"text": column})["text"]
        return text

    def _missing(self, role: str, fields: Mapping[str, Any]) -> str:
        return f"missing column {self._mapping.get(role, role)!r}, the columns here are {listing(fields)}"

    def _classified(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        assert isinstance(self._task, ClassificationConfig)
        row: dict[str, Any] = {"text": self._text(fields)}
        other = column_of("text_pair", self._mapping, fields)
        if self._pairs and other in fields:
            row["text_pair"] = normalise(fields, "text", {"text": other})["text"]
        if self._task.multi_label:
            return {**row, "labels": []}
        return {**row, "label": 0.0 if self._task.regression else self._labels[0]}

    def _tagged(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        assert isinstance(self._task, TokenClassificationConfig)
        column = column_of("tokens", self._mapping, fields)
        if column not in fields and self._mapping.get("text", "text") in fields:
            column = self._mapping.get("text", "text")
        if column not in fields:
            raise RowError(self._missing("tokens", fields))
        # Read twice: the words stand for their tags, of which there have to be as many.
        both = {"tokens": column, "tags": column}
        row = normalise(fields, "tokens_tags", both, replace(self._task, scheme=TagScheme.plain))
        tag = OUTSIDE if OUTSIDE in self._labels else self._labels[0]
        return {**row, "tags": [tag] * len(row["tokens"])}

    def _judged(self, fields: Mapping[str, Any], place: str) -> dict[str, Any]:
        try:
            fmt = recognise(fields, self._mapping, AUTOMATIC, ChatConfig(), place)
        except UserError:
            expected = "'messages', or 'prompt' and 'completion'"
            raise RowError(f"a reward is of {expected}; the columns here are {listing(fields)}") from None
        return normalise(fields, fmt, self._mapping, ChatConfig())


class Rows:
    """The rows to be answered, in order; read anew at each pass, so that they need not fit into memory.

    Raises UserError (at creation) with every row that cannot be answered, the first MOST_TOLD by name; with
    `data.on_bad_row=skip` these are left out and counted in `bad`.
    """

    def __init__(
        self,
        question: Question,
        texts: Sequence[tuple[str, str | Mapping[str, Any]]],
        files: Sequence[sources.DataFile],
        on_bad: OnBadRow,
    ):
        """texts: place and text, or place and columns, of those that are in no file."""
        if question.text_column is None and any(isinstance(text, str) for _, text in texts):
            reason = "a row of this task is more than a text"
            fix = "--input FILE with the columns of the training rows, without the answers"
            raise UserError(Problem("--text", reason, fix))
        self._question = question
        column = question.text_column or "text"
        self._texts = [(place, {column: text} if isinstance(text, str) else text) for place, text in texts]
        self._files = files
        self.count, self.bad = self._check(skips=on_bad is OnBadRow.skip)

    def blocks(self, size: int, skip: int = 0) -> Iterator[list[Asked]]:
        """The rows behind the first `skip` ones, `size` at a time."""
        rows = islice((asked for asked, _ in self._asked() if asked is not None), skip, None)
        while block := list(islice(rows, size)):
            yield block

    def bad_rows(self) -> Iterator[Problem]:
        """What is wrong with rows that are left out."""
        return (problem for _, problem in self._asked() if problem is not None)

    def columns(self) -> list[str]:
        """Columns of the first row."""
        return next((list(fields) for _, fields, _ in self._given() if fields is not None), [])

    def _given(self) -> Iterator[Given]:
        for place, fields in self._texts:
            yield place, fields, ""
        for file in self._files:
            for raw in sources.read(file):
                yield raw.place, self._of_text(file, raw.fields), raw.error

    def _of_text(self, file: sources.DataFile, fields: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
        """A line of plain text is the column that a text is, whatever the run calls it."""
        column = self._question.text_column
        if fields is None or column is None or set(fields) != {"text"} or file.ending not in DOCUMENTS:
            return fields
        return {column: fields["text"]}

    def _asked(self) -> Iterator[tuple[Asked | None, Problem | None]]:
        """Each row, or what is wrong with it."""
        for place, fields, error in self._given():
            try:
                if fields is None:
                    raise RowError(error)
                yield self._question.of(fields, place), None
            except RowError as problem:
                yield None, Problem(place, str(problem))

    def _check(self, *, skips: bool) -> tuple[int, int]:
        """Good and bad rows."""
        count, bad = 0, 0
        told: list[Problem] = []
        for asked, problem in self._asked():
            count += asked is not None
            bad += problem is not None
            if problem is not None and len(told) < MOST_TOLD:
                told.append(problem)
        if bad and not count and len({problem.reason for problem in told}) == 1:  # the same with all: told once
            missing = "missing column" in told[0].reason
            fix = f"'data.columns={{{self._question.role}: NAME}}' with the column's name" if missing else ""
            raise UserError(replace(told[0], fix=fix))
        if bad and not (skips and count):
            more = f"and {bad - len(told):,} more rows; " if bad > len(told) else ""
            fix = "data.on_bad_row=skip leaves the others out" if count else ""
            told.append(Problem("--input", f"{more}{count:,} rows are good", fix))
            raise UserError(told)
        if not count:
            raise UserError(
                Problem("--input", "there are no rows in it", "give a file with a row a line, or --text TEXT")
            )
        return count, bad
