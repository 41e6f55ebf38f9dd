"""Rows from memory: written into the run directory, and trained from there like any other file."""

from __future__ import annotations

import filecmp
import io
import itertools
import json
import math
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from dstune.core import files
from dstune.core.errors import Problem, UserError, first_line

if TYPE_CHECKING:
    import datasets
    import pandas

Rows: TypeAlias = "Iterable[Mapping[str, Any]] | datasets.Dataset | pandas.DataFrame | Any"
"""`Any`: a DataFrame of Spark."""

FOLDER = "data"
"""Where rows from memory are, below the run directory."""


def is_file(rows: Any) -> bool:
    """Whether `rows` names files (as `data.train` does) instead of holding rows."""
    return isinstance(rows, (str, os.PathLike))


def file_name(rows: Any, split: str) -> str:
    """Below the run directory, where `rows` of the split are written."""
    if _of_spark(rows):
        return f"{FOLDER}/{split}.parquet"
    table = _table(rows, split)
    return (
        f"{FOLDER}/{split}.{'jsonl' if table is None else 'arrow' if _has_empty_objects(table.schema) else 'parquet'}"
    )


def write(rows: Any, target: Path, key: str) -> None:
    """Write `rows` to `target`, which appears complete or not at all: Parquet (or Arrow) of a Dataset or DataFrame, else JSON
    lines.

    Raises:
        UserError: a row that is no mapping or holds what JSON cannot express, no rows at all, or a file with other rows
            that a saved run has trained on.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    incomplete = target.with_name(f"{target.name}{files.INCOMPLETE}")
    try:
        table = _table(rows, key)
        if _of_spark(rows):
            count = _write_spark(rows, incomplete, key)
        elif table is None:
            count = _write_lines(rows if _frame(rows) is None else _records(rows), incomplete, key)
        else:
            count = _write_table(table, incomplete, as_parquet=target.suffix == ".parquet")
        if not count:
            raise UserError(
                Problem(key, "there are no rows in it", "pass a list of mappings, a Dataset or a DataFrame")
            )
        _refuse_other_rows(target, incomplete, key)
        incomplete.replace(target)
    finally:
        incomplete.unlink(missing_ok=True)


def _refuse_other_rows(target: Path, new: Path, key: str) -> None:
    from dstune.checkpoint import store

    run = target.parents[1]
    if target.is_file() and store.newest(run) is not None and not filecmp.cmp(target, new, shallow=False):
        fix = f"pass the same rows, or leave run.dir out to start another run; dstune.load_run({str(run)!r}).resume() "
        raise UserError(Problem(key, f"the run in {run} began with other rows", f"{fix}continues with its own"))


def _table(rows: Any, key: str) -> Any:
    """A pyarrow table of a Dataset or DataFrame; None for everything else, and for a DataFrame of columns whose values are of
    several types. Neither library is imported for the question.

    Raises UserError for a DataFrame with two columns of one name.
    """
    datasets = sys.modules.get("datasets")
    if datasets is not None and isinstance(rows, datasets.Dataset):
        return rows.with_format("arrow")[:]
    if _frame(rows) is not None:
        import pyarrow

        _refuse_doubles(list(rows.columns), key)
        try:
            return pyarrow.Table.from_pandas(rows, preserve_index=False)
        except pyarrow.ArrowException:
            return None
    return None


def _refuse_doubles(columns: list[Any], key: str) -> None:
    if twice := sorted({str(name) for name in columns if columns.count(name) > 1}):
        raise UserError(Problem(key, "two columns have one name", "rename or drop one of them", ", ".join(twice)))


def _frame(rows: Any) -> Any:
    """`rows` if it is a DataFrame of pandas, else None."""
    pandas = sys.modules.get("pandas")
    return rows if pandas is not None and isinstance(rows, pandas.DataFrame) else None


def _records(frame: Any) -> Iterator[dict[str, Any]]:
    """The rows of a DataFrame; what is missing in a cell is None."""
    import pandas

    for row in frame.to_dict("records"):
        yield {
            name: None if pandas.api.types.is_scalar(value) and pandas.isna(value) else value
            for name, value in row.items()
        }


def _has_empty_objects(kind: Any) -> bool:
    """Whether a schema or type of Arrow has objects without any key, as tools without parameters are: Parquet has none."""
    import pyarrow as pa

    if isinstance(kind, pa.Schema):
        return any(_has_empty_objects(field.type) for field in kind)
    if pa.types.is_struct(kind) and not kind.num_fields:
        return True
    return any(_has_empty_objects(kind.field(at).type) for at in range(kind.num_fields))


def _write_table(table: Any, file: Path, *, as_parquet: bool) -> int:
    import pyarrow.parquet

    if as_parquet:
        pyarrow.parquet.write_table(table, file)
    else:
        with pyarrow.OSFile(str(file), "wb") as stream, pyarrow.ipc.new_file(stream, table.schema) as writer:
            writer.write_table(table)
    return int(table.num_rows)


def _of_spark(rows: Any) -> bool:
    """Whether `rows` is a DataFrame of Spark, which is not imported for the question."""
    return type(rows).__module__.startswith("pyspark.sql.") and hasattr(rows, "toLocalIterator")


def _write_spark(rows: Any, file: Path, key: str) -> int:
    """Spark promises no order: the rows are written in that of their content, a part of them in memory at a time.

    Raises UserError where Spark cannot give them.
    """
    import pyarrow

    from dstune.lakehouse.ordered import write_ordered

    _refuse_doubles(rows.columns, key)

    def batches() -> Iterator[Any]:
        try:
            schema = rows.limit(0).toArrow().schema
            iterator = (row.asDict(recursive=True) for row in rows.toLocalIterator())
            while block := list(itertools.islice(iterator, 1024)):
                plain = [{field.name: _of_type(row[field.name], field.type) for field in schema} for row in block]
                yield pyarrow.RecordBatch.from_pylist(plain, schema=schema)
        except Exception as error:  # of Java, py4j, pyspark or pyarrow
            fix = "select columns of text, numbers, times, lists and structs"
            raise UserError(Problem(key, f"Spark does not give the rows: {first_line(error)}", fix)) from None

    with tempfile.TemporaryDirectory(prefix="dstune-", dir=file.parent) as scratch:
        return write_ordered(batches(), file, Path(scratch), 2**31).rows


def _of_type(value: Any, of: Any) -> Any:
    """A value of Spark's as pyarrow takes it: Spark gives moments as times of this machine's zone without saying so, and maps
    as mappings."""
    from datetime import UTC

    from pyarrow import types

    if value is None:
        return None
    if types.is_timestamp(of):
        return value.astimezone(UTC) if of.tz else value
    if types.is_list(of) or types.is_large_list(of):
        return [_of_type(item, of.value_type) for item in value]
    if types.is_struct(of):
        return {field.name: _of_type(value.get(field.name), field.type) for field in of}
    if types.is_map(of):
        return [(_of_type(name, of.key_type), _of_type(item, of.item_type)) for name, item in value.items()]
    return value


def _write_lines(rows: Any, file: Path, key: str) -> int:
    if isinstance(rows, (Mapping, bytes)) or not isinstance(rows, Iterable):
        kind = f"a {type(rows).__module__}.{type(rows).__qualname__}".replace("builtins.", "")
        fix = "pass a list of mappings, a datasets.Dataset, a pandas.DataFrame, or the name of a file"
        raise UserError(Problem(key, f"expected rows, not {kind}", fix))
    count = 0
    problems: list[Problem] = []
    with io.TextIOWrapper(files.create_or_truncate(file), encoding="utf-8") as stream:
        for number, row in enumerate(rows, 1):
            try:
                stream.write(json.dumps(plain_row(row), ensure_ascii=False) + "\n")
            except ValueError as error:
                problems.append(Problem(f"{key}, row {number}", str(error), "rows are mappings of JSON values"))
                if len(problems) == 10:
                    break
            count = number
    if problems:
        raise UserError(problems)
    return count


def plain_row(row: Any) -> dict[str, Any]:
    """A row as JSON holds it. Raises ValueError for what it cannot hold."""
    if not isinstance(row, Mapping):
        raise ValueError(f"expected a mapping of columns, not {type(row).__name__}")
    return {str(name): _plain(value, str(name)) for name, value in row.items()}


def _plain(value: Any, where: str) -> Any:
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None  # the missing value of a table's column
    if isinstance(value, Mapping):
        return {str(name): _plain(item, f"{where}.{name}") for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, where) for item in value]
    if hasattr(value, "tolist"):  # numbers and arrays of numpy and torch
        return _plain(value.tolist(), where)
    if hasattr(value, "isoformat"):
        return value.isoformat()
    raise ValueError(f"column {where!r} holds a {type(value).__name__}, which JSON cannot express")


def each(rows: Any) -> Iterator[Mapping[str, Any] | str]:
    """The rows or texts of `rows` one by one, to be predicted. Raises UserError: `rows` holds none."""
    table = _table(rows, "rows")
    if table is not None:
        yield from table.to_pylist()
    elif _frame(rows) is not None:
        yield from _records(rows)
    elif isinstance(rows, (str, Mapping)):
        yield rows
    else:
        try:
            given = iter(rows)
        except TypeError:
            fix = "pass a list of texts or mappings, a datasets.Dataset or a pandas.DataFrame"
            raise UserError(Problem("rows", f"expected rows, not {type(rows).__name__}", fix)) from None
        yield from given
