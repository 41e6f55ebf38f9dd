"""Rows of Parquet and Arrow files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from dstune.core.errors import Problem, UserError
from dstune.core.parsing import parse_json
from dstune.data.files import DataFile, RawRow, first_line
from dstune.data.read_text import MAX_ROW_BYTES

ROWS_PER_BATCH = 1024


def read_parquet(file: DataFile, skip: int = 0) -> Iterator[RawRow]:
    """The rows behind the first `skip` ones; row groups before them are not read. Raises UserError where the file is
    broken."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file.path) as table:
            before, group = 0, 0
            while group < table.num_row_groups and before + table.metadata.row_group(group).num_rows <= skip:
                before += table.metadata.row_group(group).num_rows
                group += 1
            batches = table.iter_batches(batch_size=ROWS_PER_BATCH, row_groups=range(group, table.num_row_groups))
            yield from _rows(file, table.schema_arrow, batches, before, skip)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise _broken(file, "Parquet", error) from None


def read_arrow(file: DataFile, skip: int = 0) -> Iterator[RawRow]:
    """As `read_parquet`, of an Arrow file, an Arrow stream (as `datasets` writes them) or a Feather file."""
    import pyarrow as pa

    try:
        with pa.memory_map(str(file.path)) as source:
            schema, batches = _batches(source)
            yield from _rows(file, schema, batches, skip=skip)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise _broken(file, "Arrow", error) from None


def _batches(source: Any) -> tuple[Any, Iterable[Any]]:
    """Schema and batches of an open Arrow file or stream."""
    import pyarrow as pa

    start = source.read(6)
    source.seek(0)
    if start == b"ARROW1":
        reader = pa.ipc.open_file(source)
        return reader.schema, (reader.get_batch(number) for number in range(reader.num_record_batches))
    stream = pa.ipc.open_stream(source)
    return stream.schema, stream


def count_rows(file: DataFile) -> int | None:
    """How many rows a Parquet or Arrow file has; None for a file of another kind. Raises UserError where it is broken."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if file.ending == ".parquet":
            return int(pq.ParquetFile(file.path).metadata.num_rows)
        if file.ending in (".arrow", ".feather"):
            with pa.memory_map(str(file.path)) as source:
                return sum(len(batch) for batch in _batches(source)[1])
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise _broken(file, file.ending[1:].capitalize(), error) from None
    return None


def _broken(file: DataFile, kind: str, error: Exception) -> UserError:
    reason = f"no readable {kind} file: {first_line(error)}"
    return UserError(Problem(where=str(file), reason=reason, fix="copy it again or write it anew"))


def _rows(file: DataFile, schema: Any, batches: Iterable[Any], number: int = 0, skip: int = 0) -> Iterator[RawRow]:
    """The rows of `batches` behind the first `skip` rows of the file, of which `number` come before `batches`."""
    classes = _class_names(schema)
    nested = {field.name: value_of for field in schema if (value_of := _value_of(field.type))}
    for batch in batches:
        for start in range(0, len(batch), ROWS_PER_BATCH):  # one batch may hold the whole file
            part = batch.slice(start, ROWS_PER_BATCH)
            if number + len(part) <= skip:
                number += len(part)
                continue
            # Arrow trusts what a file says of itself: an offset that leads out of it would end the process.
            part.validate(full=True)
            for fields, fault in _values(part):
                number += 1
                if number <= skip:
                    continue
                for column, names in classes.items() if fields else ():
                    fields[column] = _named(fields[column], names)
                for column, value_of in nested.items() if fields else ():
                    fields[column] = value_of(fields[column])
                yield RawRow(file, number, fields, fault)


def _values(part: Any) -> Iterator[tuple[Any, str]]:
    """The rows of a batch as Python's values, or why one has none."""
    if _bytes(part) <= MAX_ROW_BYTES:
        try:
            yield from ((fields, "") for fields in part.to_pylist())
            return
        except (
            ValueError,
            ArithmeticError,
        ):  # text that is not UTF-8, a time beyond the year 9999: of one row, not of all
            pass
    for index in range(len(part)):
        row = part.slice(index, 1)
        if _bytes(row) > MAX_ROW_BYTES:
            yield None, f"the row has more than {MAX_ROW_BYTES >> 20} MiB"
            continue
        try:
            fields = row.to_pylist()[0]
        except (ValueError, ArithmeticError) as error:
            yield None, f"a value cannot be read: {first_line(error)}"
            continue
        yield fields, ""


def _bytes(part: Any) -> int:
    """Of a batch, without columns that share their values."""
    import pyarrow as pa

    return sum(column.nbytes for column in part.columns if not pa.types.is_dictionary(column.type))


def _class_names(schema: Any) -> dict[str, list[str]]:
    """Names of the values of columns that `datasets` stores as numbers with names (`ClassLabel`, or lists of it)."""
    if b"huggingface" not in (schema.metadata or {}):
        return {}
    import datasets

    try:
        features = datasets.Features.from_arrow_schema(schema)
    except (
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
    ):  # types of a newer release, or of images: the columns as they are
        return {}
    found = {}
    for column, feature in features.items():
        feature = getattr(feature, "feature", feature)
        if isinstance(feature, datasets.ClassLabel) and feature.names:
            found[column] = list(feature.names)
    return found


def _value_of(kind: Any) -> Callable[[Any], Any] | None:
    """What makes of a value of this type, as pyarrow gives it, what a row of JSON would hold; None where it is that already.

    A table gives each object the keys of all, so that a null of an object is a key that was absent. In JSON and in a map it
    is what somebody wrote.
    """
    import pyarrow as pa

    if isinstance(kind, getattr(pa, "JsonType", ())):  # `Json` of `datasets`: objects that differ from row to row
        return _parsed
    if pa.types.is_map(kind):
        of_key, of_item = _value_of(kind.key_type) or _same, _value_of(kind.item_type) or _same
        return lambda pairs: None if pairs is None else {of_key(key): of_item(item) for key, item in pairs}
    if pa.types.is_struct(kind):
        of_field = {field.name: _time_of(field.type) or _value_of(field.type) or _same for field in kind}
        return lambda value: (
            None if value is None else {key: of_field[key](item) for key, item in value.items() if item is not None}
        )
    if of_element := _value_of(kind.value_type) if hasattr(kind, "value_type") else None:
        if pa.types.is_dictionary(kind):
            return of_element
        return lambda items: None if items is None else [of_element(item) for item in items]
    return None


def _time_of(kind: Any) -> Callable[[Any], str] | None:
    """What writes a date or a time that a message holds as JSON has it."""
    import pyarrow as pa

    is_time = pa.types.is_date(kind) or pa.types.is_timestamp(kind) or pa.types.is_time(kind)
    return (lambda value: str(value.isoformat())) if is_time else None


def _same(value: Any) -> Any:
    return value


def _parsed(text: Any) -> Any:
    """The value of JSON text; what is no JSON stays as it is."""
    try:
        return parse_json(text) if isinstance(text, str) else text
    except ValueError:
        return text


def _named(value: Any, names: list[str]) -> Any:
    if isinstance(value, list):
        return [_named(item, names) for item in value]
    if not isinstance(value, int):
        return value
    return names[value] if 0 <= value < len(names) else None  # -1 is how such a column says that nothing is known
