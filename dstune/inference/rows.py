"""Rows to predict, from the command line, standard input or files. All of them are checked before a model is loaded."""

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
"""Bad rows that the error lists; further ones are only counted."""

ReadRow = tuple[str, Mapping[str, Any] | None, str]
"""Place (FILE:LINE, or which `--text`), columns (None if they could not be read), and what is wrong with them."""


@dataclass(frozen=True)
class Query:
    """One row to predict."""

    place: str
    fields: Mapping[str, Any]
    """The row as the user wrote it."""
    row: dict[str, Any]
    """The row as the task's encoder reads it, with a meaningless label if the encoder needs one."""


class Question:
    """Reads what a task needs of a row to predict: everything that training rows have except the answer. This class reads a text;
    tasks that need more derive from it.

    labels: the model's, in order. data: `columns` and `format` as in training.
    """

    role = "text"
    """Key in `data.columns` of the column that a row is about."""

    def __init__(self, task: Any, labels: Sequence[str], data: DataConfig):
        self.task = task
        self.labels = labels
        self.mapping = data.columns
        self.format = data.format

    @property
    def text_column(self) -> str | None:
        """The column that holds a bare text; None if a row of this task is more than a text."""
        return self.mapping.get("text", "text")

    def row(self, fields: Mapping[str, Any], place: str) -> dict[str, Any]:
        """Return the row as the task's encoder reads it, with a meaningless label if the encoder needs one. Raises RowError."""
        return {"text": self.text(fields)}

    def query(self, fields: Mapping[str, Any], place: str) -> Query:
        """Return the query for a row. place: the row's name in error messages. Raises RowError."""
        plugin_format = self._plugin_format(fields)
        row = self._row_of_format(plugin_format, fields, place) if plugin_format else self.row(fields, place)
        canonical_json(row)  # raises RowError for text that UTF-8 cannot hold: a tokenizer could not read it
        return Query(place, fields, row)

    def _plugin_format(self, fields: Mapping[str, Any]) -> str:
        """Return the row format of a plugin that reads these columns without answers; empty if the task reads them itself."""
        if self.format == AUTOMATIC and (self.text_column or self.mapping.get(self.role, self.role)) in fields:
            return ""
        for name in formats_for(task_of(self.task)):
            row_format = ROW_FORMATS[name]
            needed = [role for role in row_format.required if role not in row_format.answers]
            has_columns = all(column_of(row_format, role, self.mapping, fields) in fields for role in needed)
            if has_columns and row_format.answers and self.format in (AUTOMATIC, name):
                return name
        return ""

    def _row_of_format(self, format_name: str, fields: Mapping[str, Any], place: str) -> dict[str, Any]:
        """Return `row` of a row in a plugin's format: the plugin normalises it to a built-in one first. Raises RowError."""
        question = copy.copy(self)
        question.mapping, question.format = {}, ROW_FORMATS[format_name].shape
        return question.row(normalise(fields, format_name, self.mapping, self.task, answered=False), place)

    def text(self, fields: Mapping[str, Any], *roles: str) -> str:
        """Return the text in the first of the columns for `roles` (default: `text`) that the row has. Raises RowError if it has
        none of them."""
        roles = roles or ("text",)
        column = next((column_name for role in roles if (column_name := self.mapping.get(role, role)) in fields), None)
        if column is None:
            raise RowError(self.missing(roles[0], fields))
        text: str = normalise(fields, "text", {"text": column})["text"]
        return text

    def missing(self, role: str, fields: Mapping[str, Any]) -> str:
        """Return the reason of a RowError for a row without the column for `role`."""
        return f"missing column {self.mapping.get(role, role)!r}, the columns here are {listing(fields)}"


class Rows:
    """The rows to predict, in order. Each pass reads them again, so they need not fit into memory.

    Creation checks all rows. It raises UserError if some are bad, and lists the first MAX_LISTED_BAD_ROWS; with
    `data.on_bad_row=skip` it leaves bad rows out and counts them in `bad`.
    """

    def __init__(
        self,
        question: Question,
        texts: Sequence[tuple[str, str | Mapping[str, Any] | ValueError]],
        files: Sequence[sources.DataFile],
        on_bad: OnBadRow,
    ):
        """texts: rows that are in no file: place, and a text, columns, or the error from reading them."""
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
        """Yield the rows after the first `skip` ones, `size` at a time."""
        rows = islice((query for query, _ in self._queries() if query is not None), skip, None)
        while block := list(islice(rows, size)):
            yield block

    def bad_rows(self) -> Iterator[Problem]:
        """Yield what is wrong with each row that is left out."""
        return (problem for _, problem in self._queries() if problem is not None)

    def columns(self) -> list[str]:
        """Return the columns of the first row."""
        return next((list(fields) for _, fields, _ in self._read() if fields is not None), [])

    def _read(self) -> Iterator[ReadRow]:
        yield from self._texts
        for file in self._files:
            for raw in sources.read(file):
                yield raw.place, self._with_text_column(file, raw.fields), raw.error

    def _with_text_column(self, file: sources.DataFile, fields: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
        """Return the fields of a row; a line of plain text goes into the run's text column, whatever its name."""
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
        """Return the numbers of good and bad rows. Raises UserError if no row is good, or bad rows may not be skipped."""
        count, bad = 0, 0
        problems: list[Problem] = []
        for query, problem in self._queries():
            count += query is not None
            bad += problem is not None
            if problem is not None and len(problems) < MAX_LISTED_BAD_ROWS:
                problems.append(problem)
        if (
            bad and not count and len({problem.reason for problem in problems}) == 1
        ):  # one problem in all rows is listed once
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
                Problem("--input", "there are no rows in it", "give a file with one row per line, or --text TEXT")
            )
        return count, bad
