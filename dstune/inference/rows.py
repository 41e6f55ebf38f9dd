"""Rows without labels: texts of the command line, of standard input or of files, each checked before a model is loaded."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from dstune.config.data_schema import AUTOMATIC, DataConfig, OnBadRow
from dstune.core.errors import Problem, UserError
from dstune.data import sources
from dstune.data.files import DOCUMENTS
from dstune.data.formats import column_of
from dstune.data.problems import listing
from dstune.data.rows import RowError, canonical_json, normalise
from dstune.protocols import ROW_FORMATS, formats_for, task_of

MAX_LISTED_BAD_ROWS = 10
"""Bad rows that are named; the others are counted."""

ReadRow = tuple[str, Mapping[str, Any] | None, str]
"""Place (FILE:LINE, or which `--text` it is), columns, and what is wrong where they could not be read."""


@dataclass(frozen=True)
class Query:
    """One row to be answered."""

    place: str
    fields: Mapping[str, Any]
    """The row as it was given."""
    row: dict[str, Any]
    """As the task's encoder reads it, with a label that means nothing where it needs one."""


class Question:
    """What a task reads of a row to predict: everything that training rows have but the answer. As it stands, a text.

    labels: of the model, in their order. data: `columns` and `format` as in training.
    """

    role = "text"
    """What `data.columns` calls what a row is about."""

    def __init__(self, task: Any, labels: Sequence[str], data: DataConfig):
        self.task = task
        self.labels = labels
        self.mapping = data.columns
        self.format = data.format

    @property
    def text_column(self) -> str | None:
        """The column that a bare text is; None where a row is more than a text."""
        return self.mapping.get("text", "text")

    def row(self, fields: Mapping[str, Any], place: str) -> dict[str, Any]:
        """Return what the task's encoder reads, with a label that means nothing where it needs one. Raises RowError."""
        return {"text": self.text(fields)}

    def query(self, fields: Mapping[str, Any], place: str) -> Query:
        """Return the query that a row is. place: what a message calls the row. Raises RowError."""
        form = self._form(fields)
        row = self._shaped(form, fields, place) if form else self.row(fields, place)
        canonical_json(row)  # what UTF-8 cannot hold, a tokenizer cannot read
        return Query(place, fields, row)

    def _form(self, fields: Mapping[str, Any]) -> str:
        """Return the row format of a plugin that reads these columns without answers; empty where the task reads them itself."""
        if self.format == AUTOMATIC and (self.text_column or self.mapping.get(self.role, self.role)) in fields:
            return ""
        for name in formats_for(task_of(self.task)):
            form = ROW_FORMATS[name]
            needed = [role for role in form.required if role not in form.answers]
            has_columns = all(column_of(form, role, self.mapping, fields) in fields for role in needed)
            if has_columns and form.answers and self.format in (AUTOMATIC, name):
                return name
        return ""

    def _shaped(self, form: str, fields: Mapping[str, Any], place: str) -> dict[str, Any]:
        """Shape as `row`, of a row in a plugin's format. Raises RowError."""
        shape = copy.copy(self)
        shape.mapping, shape.format = {}, ROW_FORMATS[form].shape
        return shape.row(normalise(fields, form, self.mapping, self.task, answered=False), place)

    def text(self, fields: Mapping[str, Any], *roles: str) -> str:
        """Return the text in the first column that a row has of `roles` (default: `text`)."""
        roles = roles or ("text",)
        column = next((column_name for role in roles if (column_name := self.mapping.get(role, role)) in fields), None)
        if column is None:
            raise RowError(self.missing(roles[0], fields))
        text: str = normalise(fields, "text", {"text": column})["text"]
        return text

    def missing(self, role: str, fields: Mapping[str, Any]) -> str:
        return f"missing column {self.mapping.get(role, role)!r}, the columns here are {listing(fields)}"


class Rows:
    """The rows to be answered, in order; read anew at each pass, so that they need not fit into memory.

    Raises UserError (at creation) with every row that cannot be answered, the first MAX_LISTED_BAD_ROWS by name; with
    `data.on_bad_row=skip` these are left out and counted in `bad`.
    """

    def __init__(
        self,
        question: Question,
        texts: Sequence[tuple[str, str | Mapping[str, Any] | ValueError]],
        files: Sequence[sources.DataFile],
        on_bad: OnBadRow,
    ):
        """texts: place and text, columns, or what is wrong with them, of those that are in no file."""
        if question.text_column is None and any(isinstance(text, str) for _, text in texts):
            reason = "a row of this task is more than a text"
            fix = "--input FILE with the columns of the training rows, without the answers"
            raise UserError(Problem("--text", reason, fix))
        self._question = question
        column = question.text_column or "text"
        self._texts: list[ReadRow] = [
            (place, None, str(text))
            if isinstance(text, ValueError)
            else (place, {column: text} if isinstance(text, str) else text, "")
            for place, text in texts
        ]
        self._files = files
        self.count, self.bad = self._check(skips=on_bad is OnBadRow.skip)

    def blocks(self, size: int, skip: int = 0) -> Iterator[list[Query]]:
        """Yield the rows behind the first `skip` ones, `size` at a time."""
        rows = islice((query for query, _ in self._queries() if query is not None), skip, None)
        while block := list(islice(rows, size)):
            yield block

    def bad_rows(self) -> Iterator[Problem]:
        """Yield what is wrong with rows that are left out."""
        return (problem for _, problem in self._queries() if problem is not None)

    def columns(self) -> list[str]:
        """Return columns of the first row."""
        return next((list(fields) for _, fields, _ in self._read() if fields is not None), [])

    def _read(self) -> Iterator[ReadRow]:
        yield from self._texts
        for file in self._files:
            for raw in sources.read(file):
                yield raw.place, self._of_text(file, raw.fields), raw.error

    def _of_text(self, file: sources.DataFile, fields: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
        """Return the fields of a row; a line of plain text under the name of the run's text column, whatever that is."""
        column = self._question.text_column
        if fields is None or column is None or set(fields) != {"text"} or file.ending not in DOCUMENTS:
            return fields
        return {column: fields["text"]}

    def _queries(self) -> Iterator[tuple[Query | None, Problem | None]]:
        """Yield each row, or what is wrong with it."""
        for place, fields, error in self._read():
            try:
                if fields is None:
                    raise RowError(error)
                yield self._question.query(fields, place), None
            except RowError as problem:
                yield None, Problem(place, str(problem))

    def _check(self, *, skips: bool) -> tuple[int, int]:
        """Count good and bad rows."""
        count, bad = 0, 0
        problems: list[Problem] = []
        for query, problem in self._queries():
            count += query is not None
            bad += problem is not None
            if problem is not None and len(problems) < MAX_LISTED_BAD_ROWS:
                problems.append(problem)
        if bad and not count and len({problem.reason for problem in problems}) == 1:  # the same with all: told once
            missing = "missing column" in problems[0].reason
            fix = f"'data.columns={{{self._question.role}: NAME}}' with the column's name" if missing else ""
            raise UserError(replace(problems[0], fix=fix))
        if bad and not (skips and count):
            further = f"and {bad - len(problems):,} more rows; " if bad > len(problems) else ""
            fix = "data.on_bad_row=skip leaves the others out" if count else ""
            problems.append(Problem("--input", f"{further}{count:,} rows are good", fix))
            raise UserError(problems)
        if not count:
            raise UserError(
                Problem("--input", "there are no rows in it", "give a file with a row a line, or --text TEXT")
            )
        return count, bad
