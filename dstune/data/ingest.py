"""Files to checked rows on disk: one Arrow file of rows as JSON text, so that memory holds none of them."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from dstune.config.data_schema import AUTOMATIC
from dstune.config.schema import RunConfig
from dstune.core.errors import Problem, UserError
from dstune.data import sources
from dstune.data.bad_rows import FIRST_ROWS, BadRows, UnknownFormat, reason_for_row
from dstune.data.images.places import COLUMN
from dstune.data.images.store import ImageWriter
from dstune.data.rows import RowError, check_task, hash_of, json_text, labels_of, normalise, recognise
from dstune.data.swaps import slice_values
from dstune.data.unread import SYNTHETIC, Unread
from dstune.protocols import task_of

ROWS_PER_BATCH = 1000

log = logging.getLogger(__name__)

ROW_SCHEMA = pa.schema(
    [
        ("row", pa.large_string()),
        ("number", pa.int64()),
        ("hash", pa.uint64()),
        ("label", pa.string()),
        ("file", pa.int32()),
        ("line", pa.int64()),
        ("slices", pa.string()),
    ]
)


@dataclass(frozen=True)
class Table:
    """The good rows of one part, memory-mapped, in file order."""

    data: datasets.Dataset
    """Columns of `ROW_SCHEMA`: `row` is the normalised row as JSON text, `number` counts from 0, `slices` holds the values of
    `evaluate.slices` as JSON text."""
    files: list[sources.DataFile]
    format: str
    """`messages` where any of the rows is a conversation."""
    rows_read: int
    bad_rows: int
    hashes: np.ndarray
    """uint64 [rows], memory-mapped."""
    labels: np.ndarray | None
    """Label names [rows], for classification; lists of them as JSON text where a row has several."""
    sources: np.ndarray | None = None
    """Number of the source in a mixture, int16 [rows]."""
    kept: np.ndarray | None = None
    """Which rows cleaning left, bool [rows]; None before it."""
    text_keys: np.ndarray | None = None
    """Equal for rows of equal text (the second of `clean.rows.keys`), uint64 [rows]; None before cleaning."""
    bad_examples: tuple[dict[str, str], ...] = ()
    """The first of the bad rows: `place` and, as `text`, the reason."""
    columns: frozenset[str] = frozenset()
    """Of all rows of the files."""
    unread: Mapping[str, int] = field(default_factory=dict)
    """By column that looks like content and is not read, the rows in which it holds something."""
    synthetic_rows: int = 0
    """Of the good rows, those that `dstune synthesize` made."""

    @property
    def rows(self) -> np.ndarray:
        """Numbers of the rows that are left, int64."""
        return np.arange(len(self.hashes)) if self.kept is None else np.flatnonzero(self.kept)

    def place(self, number: int) -> str:
        """Return `FILE:LINE` of a row."""
        fields = self.data[int(number)]
        return sources.place(self.files[fields["file"]], fields["line"])

    def places(self, numbers: np.ndarray) -> list[str]:
        """Return `FILE:LINE` of each of these rows."""
        origins = self.data.select(numbers).select_columns(["file", "line"])[:]
        return [
            sources.place(self.files[file], line) for file, line in zip(origins["file"], origins["line"], strict=True)
        ]


def ingest(
    files: list[sources.DataFile],
    config: RunConfig,
    target: Path,
    bad: BadRows,
    rows: Iterable[tuple[int, sources.RawRow]] | None = None,
    images: ImageWriter | None = None,
) -> Table:
    """Read and check all rows of `files` into `target`, or only `rows` (each with the number of its file). Bad rows go
    to `bad`. images: takes those that rows hold.

    Raises UserError if the columns are those of no format, a file is unreadable as a whole, or there is no row at all.
    """
    reader = _Reader(config, bad, images)
    already_bad = bad.count
    with pa.OSFile(str(target), "wb") as stream, pa.ipc.new_stream(stream, ROW_SCHEMA) as writer:
        for batch in reader.batches(_with_progress(files, _all_rows(files) if rows is None else rows)):
            writer.write_batch(batch)
    if not reader.rows_read:
        names = ", ".join(str(file) for file in files)
        raise UserError(Problem(where=names, reason="holds no rows", fix="give a file with at least one row"))
    assert reader.format is not None or bad.count, "rows without a format"
    fmt = "messages" if reader.any_messages else reader.format or AUTOMATIC
    table = load_table(target, files, config, fmt, reader.rows_read, bad.count - already_bad)
    table = replace(table, bad_examples=tuple(bad.first(already_bad)))
    if reader.unread is None:
        return table
    columns, synthetic = frozenset(reader.unread.columns), reader.synthetic_rows
    return replace(table, columns=columns, unread=reader.unread.rows, synthetic_rows=synthetic)


def load_table(
    target: Path, files: list[sources.DataFile], config: RunConfig, fmt: str, rows_read: int, bad_rows: int
) -> Table:
    """Return the rows that were written to `target`."""
    data = datasets.Dataset.from_file(str(target))
    columns = data.data.table
    hashes = numbers_on_disk(columns["hash"], Path(f"{target}.hashes"))
    labels = None
    if task_of(config.task).has_labels:
        # By way of the different ones: a text object for each row would take 60 bytes and more.
        encoded = columns["label"].combine_chunks().dictionary_encode()
        names = np.array(encoded.dictionary.to_pylist(), dtype=object if task_of(config.task).several_labels else str)
        labels = names[encoded.indices.to_numpy()]
    return Table(data, files, fmt, rows_read, bad_rows, hashes, labels)


def numbers_on_disk(column: pa.ChunkedArray, file: Path) -> np.ndarray:
    """Return a column of numbers without gaps, memory-mapped from `file` so that memory holds none of them: [rows]."""
    kind = column.type.to_pandas_dtype()
    with file.open("wb") as stream:
        for chunk in column.chunks:
            stream.write(chunk.to_numpy())
    return np.memmap(file, kind, mode="r") if len(column) else np.empty(0, kind)


def _with_progress(
    files: list[sources.DataFile], rows: Iterable[tuple[int, sources.RawRow]]
) -> Iterator[tuple[int, sources.RawRow]]:
    """Yield `rows`, and log their number every ROWS_PER_BATCH rows."""
    further = f" and {len(files) - 1} more files" if len(files) > 1 else ""
    for count, row in enumerate(rows, 1):
        if count % ROWS_PER_BATCH == 0:
            log.info("reading %s%s", files[0].path.name, further, extra={"done": count})
        yield row


def _all_rows(files: list[sources.DataFile]) -> Iterator[tuple[int, sources.RawRow]]:
    for number, file in enumerate(files):
        for raw in sources.read(file):
            yield number, raw


class _Reader:
    def __init__(self, config: RunConfig, bad: BadRows, images: ImageWriter | None):
        self._images = images
        self._data = config.data
        self._task_config, self._task = config.task, task_of(config.task)
        self._slices = config.evaluate.slices
        self._input_apart = config.model.prompt_template == "alpaca"
        self._bad = bad
        self._unknown: UserError | None = None
        self._unknown_rows = 0
        self.format: str | None = None
        self.unread: Unread | None = None
        self.any_messages = False
        self.rows_read = self.synthetic_rows = 0

    def batches(self, rows: Iterable[tuple[int, sources.RawRow]]) -> Iterator[pa.RecordBatch]:
        waiting: list[tuple] = []
        number = 0
        for file_number, raw in rows:
            self.rows_read += 1
            try:
                row, content_hash_value, label = self._read_row(raw)
            except RowError as error:
                self._bad.add(raw.place, str(error))
                continue
            fields = raw.fields or {}
            slices = json.dumps(slice_values(fields, self._slices)) if self._slices else None
            self.synthetic_rows += bool(fields.get(SYNTHETIC))
            waiting.append((row, number, content_hash_value, label, file_number, raw.line, slices))
            number += 1
            if len(waiting) == ROWS_PER_BATCH:
                yield _batch(waiting)
                waiting.clear()
        if self.format is None and self._unknown is not None:
            raise UnknownFormat(self._unknown.problems)
        if waiting:
            yield _batch(waiting)

    def _read_row(self, raw: sources.RawRow) -> tuple[str, int, str | None]:
        """Return the row in the shape of its format as JSON text, its hash (64 bits) and its label. Raises RowError."""
        if raw.fields is None:
            raise RowError(raw.error)
        mapping, format_name = self._data.columns, self._data.format
        if self.format is None or self.unread is None:
            self.format = self._recognise(raw)
            self.unread = Unread(self.format, mapping, self._slices)
        check_task(self.format, raw.fields, mapping, format_name, self._task_config, raw.place)
        self.unread.add(raw.fields)
        row = normalise(raw.fields, self.format, mapping, self._task_config, input_apart=self._input_apart)
        self.any_messages |= "messages" in row or isinstance(row.get("chosen"), list)
        label = None
        if self._task.has_labels:
            self._refuse_other_labels(row)
            label = json.dumps(labels_of(row)) if self._task.several_labels else row["label"]
        row_hash = hash_of(row, self._data.split.seed)  # first, since it raises for values that are not JSON
        if COLUMN in row and self._task.sees_images:
            assert self._images is not None, "nobody takes the images"
            row = self._images.take(row, raw.file.path)
        return json_text(row), row_hash, label

    def _recognise(self, raw: sources.RawRow) -> str:
        """Return the format of a row that can be read. Raises RowError for one of the first rows that has no format of this
        task, as long as a later one may have; UserError where none of them has."""
        assert raw.fields is not None
        try:
            return recognise(raw.fields, self._data.columns, self._data.format, self._task_config, raw.place)
        except UserError as error:
            self._unknown = self._unknown or error
            self._unknown_rows += 1
            if self._unknown_rows == FIRST_ROWS or (reason := reason_for_row(error, raw.place)) is None:
                raise UnknownFormat(self._unknown.problems) from None
            raise RowError(reason) from None

    def _refuse_other_labels(self, row: dict[str, Any]) -> None:
        allowed_labels = self._task.given_labels
        for name in labels_of(row) if allowed_labels else ():
            if name not in allowed_labels:
                raise RowError(f"label {name!r} is not among task.labels ({', '.join(allowed_labels)})")


def _batch(rows: list[tuple]) -> pa.RecordBatch:
    columns = zip(*rows, strict=True)
    arrays = [pa.array(column, field.type) for column, field in zip(columns, ROW_SCHEMA, strict=True)]
    return pa.record_batch(arrays, schema=ROW_SCHEMA)
