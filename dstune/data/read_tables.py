"""Read the rows of Parquet and Arrow files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from dstune.core.confinement.here import TooMuch, limited
from dstune.core.confinement.table import TABLE_PIECE, Limits
from dstune.core.errors import Problem, UserError, first_line
from dstune.core.parsing import parse_json
from dstune.data.files import DataFile, RawRow
from dstune.data.message import WrittenObject, as_written
from dstune.data.read_text import MAX_ROW_BYTES, refuse_doubled
from dstune.planning.host import available_bytes

ROWS_PER_BATCH = 1024
MAX_BATCH_BYTES = TABLE_PIECE.added_bytes
"""Limit of the memory for `ROWS_PER_BATCH` rows as Python values; larger batches are read in smaller steps."""


def read_parquet(file: DataFile, skip: int = 0, rows: int = ROWS_PER_BATCH) -> Iterator[RawRow]:
    """Yield the rows after the first `skip` rows; row groups before them are not read.

    rows: number of rows to read at a time; it is reduced if they take too much memory, since a page of a few bytes may expand to
    gigabytes. Raises UserError if the file is broken.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    done = skip
    try:
        with pq.ParquetFile(file.path) as table:
            rows_before, group = 0, 0
            while group < table.num_row_groups and rows_before + table.metadata.row_group(group).num_rows <= skip:
                rows_before += table.metadata.row_group(group).num_rows
                group += 1
            batches = table.iter_batches(batch_size=rows, row_groups=range(group, table.num_row_groups))
            batches = within_memory(batches, MAX_BATCH_BYTES if rows > 1 else None)
            for row in _rows(file, table.schema_arrow, batches, rows_before, skip):
                done = row.line
                yield row
        return
    except TooMuch as error:
        if rows == 1:
            raise _too_much(file, f"row {done + 1}", error) from None
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise _broken(file, "Parquet", error) from None
    yield from read_parquet(file, done, max(1, rows // 32))


def read_arrow(file: DataFile, skip: int = 0) -> Iterator[RawRow]:
    """Yield the rows after the first `skip` rows of an Arrow file, an Arrow stream (as `datasets` writes) or a Feather file.

    Raises UserError if the file is broken.
    """
    import pyarrow as pa

    try:
        with pa.memory_map(str(file.path)) as source:
            schema, batches = _batches(source)
            yield from _rows(file, schema, batches, skip=skip)
    except TooMuch as error:
        raise _too_much(file, "a batch", error) from None
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise _broken(file, "Arrow", error) from None


def within_memory(batches: Iterable[Any], most: float | None = None) -> Iterator[Any]:
    """Yield the batches. Raises TooMuch if unpacking one takes more than `most` bytes, or half of the free memory if None."""
    remaining = iter(batches)
    while True:
        with limited(Limits(added_bytes=int(most or available_bytes() / 2))):
            batch = next(remaining, None)
        if batch is None:
            return
        yield batch


def _batches(source: Any) -> tuple[Any, Iterable[Any]]:
    """Return the schema and the batches of an open Arrow file or stream."""
    import pyarrow as pa

    start = source.read(6)
    source.seek(0)
    if start == b"ARROW1":
        reader = pa.ipc.open_file(source)
        return reader.schema, within_memory(reader.get_batch(number) for number in range(reader.num_record_batches))
    stream = pa.ipc.open_stream(source)
    return stream.schema, within_memory(stream)


def count_rows(file: DataFile) -> int | None:
    """Return the number of rows in a Parquet or Arrow file; None for other files. Raises UserError if the file is broken."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if file.ending == ".parquet":
            return int(pq.ParquetFile(file.path).metadata.num_rows)
        if file.ending in (".arrow", ".feather"):
            with pa.memory_map(str(file.path)) as source:
                return sum(len(batch) for batch in _batches(source)[1])
    except TooMuch as error:
        raise _too_much(file, "a batch", error) from None
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise _broken(file, file.ending[1:].capitalize(), error) from None
    return None


def _broken(file: DataFile, kind: str, error: Exception) -> UserError:
    reason = f"no readable {kind} file: {first_line(error)}"
    return UserError(Problem(where=str(file), reason=reason, fix="copy it again or write it anew"))


def _too_much(file: DataFile, need: str, error: TooMuch) -> UserError:
    reason = f"{need} {error}, half of what is free"
    return UserError(
        Problem(where=str(file), reason=reason, fix="write it in smaller batches, or read it on a larger machine")
    )


def _rows(file: DataFile, schema: Any, batches: Iterable[Any], number: int = 0, skip: int = 0) -> Iterator[RawRow]:
    """Yield the rows of `batches`, without the first `skip` rows of the file. number: rows of the file before `batches`."""
    refuse_doubled(schema.names, str(file))
    classes = _class_names(schema)
    converters = {field.name: converter for field in schema if (converter := _converter(field.type))}
    for batch in batches:
        for start in range(0, len(batch), ROWS_PER_BATCH):  # one batch may hold the whole file
            part = batch.slice(start, ROWS_PER_BATCH)
            if number + len(part) <= skip:
                number += len(part)
                continue
            # Arrow trusts the offsets in a file: one that points outside of it would crash the process.
            part.validate(full=True)
            for fields, fault in _values(part):
                number += 1
                if number <= skip:
                    continue
                for column, names in classes.items() if fields else ():
                    fields[column] = _with_names(fields[column], names)
                for column, convert in converters.items() if fields else ():
                    fields[column] = convert(fields[column])
                yield RawRow(file, number, fields, fault)


def _values(part: Any) -> Iterator[tuple[Any, str]]:
    """Yield each row of a batch as Python values with an empty reason, or None with the reason that it cannot be read."""
    shares = any(_shares(column.type) for column in _with_own_values(part.slice(0, 0)).columns)
    if not shares:
        try:
            with limited(Limits(added_bytes=MAX_BATCH_BYTES)):
                unfolded = _with_own_values(part)
                rows = unfolded.to_pylist() if _bytes(unfolded) <= MAX_ROW_BYTES else None
            if rows is not None:
                yield from ((fields, "") for fields in rows)
                return
        except (ValueError, ArithmeticError, TooMuch):
            pass  # text that is not UTF-8, a time beyond the year 9999: of one row, not of all
    too_long = f"the row has more than {MAX_ROW_BYTES >> 20} MiB"
    for index in range(len(part)):
        try:
            with limited(Limits(added_bytes=MAX_BATCH_BYTES)):
                row = _with_own_values(part.slice(index, 1))
                fields = row.to_pylist()[0] if _bytes(row) <= MAX_ROW_BYTES else None
        except (ValueError, ArithmeticError) as error:
            yield None, f"a value cannot be read: {first_line(error)}"
        except TooMuch:
            yield None, too_long
        else:
            bad = fields is None or (shares and _length(fields) > MAX_ROW_BYTES)
            yield (None, too_long) if bad else (fields, "")


def _with_own_values(batch: Any) -> Any:
    """Return `batch` with shared values copied to each row. Dictionaries, runs and views of a few bytes may expand to gigabytes,
    which must be counted."""
    import pyarrow as pa
    import pyarrow.compute as pc

    def expanded(column: Any) -> Any:
        if pa.types.is_dictionary(column.type):
            return expanded(column.dictionary_decode())
        if pa.types.is_run_end_encoded(column.type):
            return expanded(pc.run_end_decode(column))
        if pa.types.is_string_view(column.type):
            return column.cast(pa.large_string())
        return column.cast(pa.large_binary()) if pa.types.is_binary_view(column.type) else column

    return pa.RecordBatch.from_arrays([expanded(column) for column in batch.columns], names=batch.schema.names)


def _shares(kind: Any) -> bool:
    """Return whether values of an Arrow type may share memory."""
    import pyarrow as pa

    type_checks = (
        pa.types.is_dictionary,
        pa.types.is_run_end_encoded,
        pa.types.is_string_view,
        pa.types.is_binary_view,
    )
    views = (*type_checks, pa.types.is_list_view, pa.types.is_large_list_view)
    return any(test(kind) for test in views) or any(_shares(kind.field(at).type) for at in range(kind.num_fields))


def _length(value: Any) -> int:
    """Return the number of characters and bytes in a value; a number counts as 8."""
    if isinstance(value, dict):
        return sum(map(_length, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(_length, value))
    return len(value) if isinstance(value, str | bytes) else 8


def _bytes(part: Any) -> int:
    return sum(column.nbytes for column in part.columns)


def _class_names(schema: Any) -> dict[str, list[str]]:
    """Return the label names by column, for columns that `datasets` stores as numbers with names (`ClassLabel`, or lists of it)."""
    if b"huggingface" not in (schema.metadata or {}):
        return {}
    import datasets

    try:
        features = datasets.Features.from_arrow_schema(schema)
    except (ValueError, TypeError, KeyError, AttributeError):  # types of a newer release: the columns stay as they are
        return {}
    names_by_column = {}
    for column, feature in features.items():
        feature = getattr(feature, "feature", feature)
        if isinstance(feature, datasets.ClassLabel) and feature.names:
            names_by_column[column] = list(feature.names)
    return names_by_column


def _converter(kind: Any) -> Callable[[Any], Any] | None:
    """Return the function that converts pyarrow's values of this type to those of a JSON row; None if they need no conversion.

    A table gives each object the keys of all objects, so a null in an object is a key that was absent, and is removed. In JSON
    and in a map, somebody wrote the null, and it stays.
    """
    import pyarrow as pa

    if isinstance(kind, getattr(pa, "JsonType", ())):  # `Json` of `datasets`: objects that differ from row to row
        return _parsed
    if pa.types.is_map(kind):
        convert_key, convert_item = _converter(kind.key_type) or _same, _converter(kind.item_type) or _same
        return lambda pairs: (
            None if pairs is None else WrittenObject({convert_key(key): convert_item(item) for key, item in pairs})
        )
    if pa.types.is_struct(kind):
        converters = {field.name: _time_of(field.type) or _converter(field.type) or _same for field in kind}
        return lambda value: (
            None if value is None else {key: converters[key](item) for key, item in value.items() if item is not None}
        )
    if convert_element := _converter(kind.value_type) if hasattr(kind, "value_type") else None:
        if pa.types.is_dictionary(kind):
            return convert_element
        return lambda items: None if items is None else [convert_element(item) for item in items]
    return None


def _time_of(kind: Any) -> Callable[[Any], str] | None:
    """Return the function that writes a date or a time in an object as text, as in JSON; None for other types."""
    import pyarrow as pa

    is_time = pa.types.is_date(kind) or pa.types.is_timestamp(kind) or pa.types.is_time(kind)
    return (lambda value: str(value.isoformat())) if is_time else None


def _same(value: Any) -> Any:
    return value


def _parsed(text: Any) -> Any:
    """Return the value of JSON text; anything else stays as it is."""
    try:
        return as_written(parse_json(text)) if isinstance(text, str) else text
    except ValueError:
        return text


def _with_names(value: Any, names: list[str]) -> Any:
    if isinstance(value, list):
        return [_with_names(item, names) for item in value]
    if not isinstance(value, int):
        return value
    return names[value] if 0 <= value < len(names) else None  # -1 stands for an unknown class
