"""Writes rows from memory into the run directory, where they are trained on like any other file."""

from __future__ import annotations

import filecmp
import io
import json
import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from dstune.core import files
from dstune.core.errors import Problem, UserError
from dstune.protocols import DATA_SOURCES
from dstune.protocols.data_source import HoldsRows

if TYPE_CHECKING:
    import datasets
    import pandas

Rows: TypeAlias = "Iterable[Mapping[str, Any]] | datasets.Dataset | pandas.DataFrame | Any"
"""`Any`: rows of a data source, such as a Spark DataFrame."""

FOLDER = "data"
"""The folder of rows from memory, inside the run directory."""


def is_file(rows: Any) -> bool:
    """Return whether `rows` names files (as `data.train` does) instead of holding rows."""
    return isinstance(rows, (str, os.PathLike))


def file_name(rows: Any, split: str) -> str:
    """Return the file inside the run directory to which `rows` of the split are written."""
    if _holder(rows) is not None:
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
        if (holder := _holder(rows)) is not None:
            count = holder.save(rows, incomplete, key)
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
    """Return a pyarrow table of a Dataset or DataFrame; None for everything else, and for a DataFrame with columns of mixed types.
    Imports neither library. Raises UserError for a DataFrame with duplicate column names."""
    datasets = sys.modules.get("datasets")
    if datasets is not None and isinstance(rows, datasets.Dataset):
        return rows.with_format("arrow")[:]
    if _frame(rows) is not None:
        import pyarrow

        refuse_doubles(list(rows.columns), key)
        try:
            return pyarrow.Table.from_pandas(rows, preserve_index=False)
        except pyarrow.ArrowException:
            return None
    return None


def refuse_doubles(columns: list[Any], key: str) -> None:
    """Raise UserError for duplicate column names."""
    if twice := sorted({str(name) for name in columns if columns.count(name) > 1}):
        raise UserError(Problem(key, "two columns have one name", "rename or drop one of them", ", ".join(twice)))


def _frame(rows: Any) -> Any:
    """Return `rows` if it is a DataFrame of pandas, else None."""
    pandas = sys.modules.get("pandas")
    return rows if pandas is not None and isinstance(rows, pandas.DataFrame) else None


def _records(frame: Any) -> Iterator[dict[str, Any]]:
    """Yield the rows of a DataFrame; a missing cell is None."""
    import pandas

    for row in frame.to_dict("records"):
        yield {
            name: None if pandas.api.types.is_scalar(value) and pandas.isna(value) else value
            for name, value in row.items()
        }


def _has_empty_objects(kind: Any) -> bool:
    """Return whether an Arrow schema or type contains structs without fields, such as tools without parameters: Parquet does not
    support them."""
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


def _holder(rows: Any) -> HoldsRows | None:
    """Return the data source for rows of this class; None if there is none."""
    if isinstance(rows, (list, tuple, Iterator)):  # no data source needs to be asked
        return None
    sources = (source() for source in DATA_SOURCES.classes().values())
    return next((source for source in sources if isinstance(source, HoldsRows) and source.holds(rows)), None)


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
    """Return a row in JSON types. Raises ValueError for a value that JSON cannot hold."""
    if not isinstance(row, Mapping):
        raise ValueError(f"expected a mapping of columns, not {type(row).__name__}")
    return {str(name): _json_value(value, str(name)) for name, value in row.items()}


def _json_value(value: Any, where: str) -> Any:
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None  # the missing value of a table's column
    if isinstance(value, Mapping):
        return {str(name): _json_value(item, f"{where}.{name}") for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_value(item, where) for item in value]
    if hasattr(value, "tolist"):  # numbers and arrays of numpy and torch
        return _json_value(value.tolist(), where)
    if hasattr(value, "isoformat"):
        return value.isoformat()
    raise ValueError(f"column {where!r} holds a {type(value).__name__}, which JSON cannot express")


def iterate_rows(rows: Any) -> Iterator[Mapping[str, Any] | str]:
    """Yield the rows or texts of `rows` one by one, for prediction. Raises UserError if `rows` holds none."""
    table = _table(rows, "rows")
    if table is not None:
        yield from table.to_pylist()
    elif _frame(rows) is not None:
        yield from _records(rows)
    elif isinstance(rows, (str, Mapping)):
        yield rows
    else:
        try:
            iterator = iter(rows)
        except TypeError:
            fix = "pass a list of texts or mappings, a datasets.Dataset or a pandas.DataFrame"
            raise UserError(Problem("rows", f"expected rows, not {type(rows).__name__}", fix)) from None
        yield from iterator
