"""Converts the JSON lines of answers to a table in CSV or Parquet."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

TABLES = (".csv", ".tsv", ".parquet")
ROWS_AT_ONCE = 1024


@contextmanager
def as_named(lines: Path, ending: str) -> Iterator[Path]:
    """Yield the file of JSON lines itself, or for the ending of a table a file beside it that has the same rows as a table."""
    ending = ending.lower()
    if ending not in TABLES:
        yield lines
        return
    table = lines.with_name(f"{lines.name}.table")
    try:
        (_write_parquet if ending == ".parquet" else _write_csv)(lines, table, ending)
        yield table
    finally:
        table.unlink(missing_ok=True)


def _rows(lines: Path) -> Iterator[dict[str, Any]]:
    with lines.open(encoding="utf-8") as stream:
        for line in stream:
            yield json.loads(line)


def _write_csv(lines: Path, target: Path, ending: str) -> None:
    """Write a column for each key of any row. Lists and objects become JSON text; missing values are empty."""
    columns = dict.fromkeys(name for row in _rows(lines) for name in row)
    with target.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, delimiter="\t" if ending == ".tsv" else ",", lineterminator="\n")
        writer.writerow(columns)
        writer.writerows([_cell(row.get(name)) for name in columns] for row in _rows(lines))


def _cell(value: Any) -> Any:
    if value is None:
        return ""
    if isinstance(value, bool | list | dict):
        return json.dumps(value, ensure_ascii=False)
    return value


def _write_parquet(lines: Path, target: Path, ending: str) -> None:
    """Write columns with the types of their values; columns with values of several types become JSON text."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    types: dict[str, Any] = {}
    for rows in _batches(lines):
        for name in dict.fromkeys(name for row in rows for name in row):
            types[name] = _common_type(types.get(name, pa.null()), [row.get(name) for row in rows])
    mixed = {name for name, kind in types.items() if kind is None}
    schema = pa.schema([(name, pa.string() if name in mixed else kind) for name, kind in types.items()])
    with pq.ParquetWriter(target, schema) as writer:
        for rows in _batches(lines):
            columns = {
                name: [_text(row.get(name)) if name in mixed else row.get(name) for row in rows] for name in types
            }
            arrays = [pa.array(columns[field.name], field.type) for field in schema]
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema))


def _batches(lines: Path) -> Iterator[list[dict[str, Any]]]:
    rows = _rows(lines)
    while batch := list(islice(rows, ROWS_AT_ONCE)):
        yield batch


def _common_type(earlier_type: Any, values: list[Any]) -> Any:
    """Return the Arrow type that all values and `earlier_type` share; None if there is none."""
    import pyarrow as pa

    if earlier_type is None:
        return None
    try:
        kinds = [pa.schema([("", earlier_type)]), pa.schema([("", pa.array(values).type)])]
        return pa.unify_schemas(kinds, promote_options="permissive").field(0).type
    except (pa.ArrowException, OverflowError):
        return None


def _text(value: Any) -> str | None:
    return None if value is None else json.dumps(value, ensure_ascii=False)
