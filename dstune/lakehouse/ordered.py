"""Writes rows in the order of their content, in bounded memory. A row's key is a digest of its values, so equal rows have equal
keys, and the order does not depend on file, writer or version. Pieces of `PIECE_BYTES` are sorted and written as files with a batch
per range of keys; then the ranges are merged one after the other."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

PIECE_BYTES = 2**24
RANGE_BYTES = 2**24
MAX_RANGE_BYTES = 2**26
"""Larger ranges are sorted in parts of this size."""
MAX_RANGES = 4096
ROWS_PER_GROUP = 2**16
ORDER = "xxh3_128 of each row's values"


@dataclass(frozen=True)
class Written:
    rows: int
    digest: str
    """Digest of the ordered keys: equal for equal rows, in whatever order they arrived."""


def write_ordered(batches: Iterable[Any], out: Path, scratch: Path, size: int) -> Written:
    """Write the rows of `batches` (pyarrow) to the Parquet file `out`. scratch: an empty folder. size: the approximate size of the
    rows in bytes."""
    ranges = min(MAX_RANGES, 1 << max(0, (size // RANGE_BYTES).bit_length()))
    pieces: list[Path] = []
    waiting: list[Any] = []
    schema: pa.Schema | None = None
    for batch in batches:
        schema = schema or plain_schema(batch.schema)
        waiting.append(_plain(batch, schema))
        if sum(waiting_batch.nbytes for waiting_batch in waiting) >= PIECE_BYTES:
            pieces.append(_write_piece(waiting, scratch / f"{len(pieces)}.arrow", ranges))
            waiting = []
    if waiting:
        pieces.append(_write_piece(waiting, scratch / f"{len(pieces)}.arrow", ranges))
    if schema is None or not pieces:
        return Written(0, xxhash.xxh3_128().hexdigest())
    return _merge(pieces, schema, out, ranges)


def _write_piece(batches: list[Any], file: Path, ranges: int) -> Path:
    table = pa.Table.from_batches(batches).combine_chunks()
    keys = row_keys(table)
    order = _sorted(keys)
    keys = keys[order]
    table = table.take(pa.array(order)).append_column(KEY, _as_column(keys)).combine_chunks()
    ends = np.searchsorted(_range_of(keys, ranges), np.arange(ranges), "right")
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        start = 0
        for end in ends.tolist():
            part = table.slice(start, end - start).combine_chunks()
            writer.write_batch(
                part.to_batches()[0] if end > start else pa.RecordBatch.from_pylist([], schema=table.schema)
            )
            start = end
    return file


def _merge(pieces: list[Path], schema: Any, out: Path, ranges: int) -> Written:
    digest, rows = xxhash.xxh3_128(), 0
    with pq.ParquetWriter(out, schema) as writer:
        for number in range(ranges):
            batches = []
            for piece in pieces:
                with pa.memory_map(str(piece)) as source:
                    batches.append(pa.ipc.open_file(source).get_batch(number))
            size = sum(batch.nbytes for batch in batches)
            keys = np.concatenate([_from_column(batch[KEY]) for batch in batches])
            order = _sorted(keys)
            digest.update(keys[order].tobytes())
            batches = [batch.drop_columns([KEY]) for batch in batches]
            # Equal rows fall into one range, however many they are, so a range is written in parts.
            for part in np.array_split(order, -(-size // MAX_RANGE_BYTES)) if len(order) else ():
                writer.write_table(_take(batches, part), row_group_size=ROWS_PER_GROUP)
            rows += len(order)
    return Written(rows, digest.hexdigest())


def _take(batches: list[Any], order: Any) -> Any:
    """Return the rows of the concatenated `batches` at the indices `order`, as a table."""
    ends = np.cumsum([len(batch) for batch in batches])
    batch_numbers = np.searchsorted(ends, order, "right")
    parts = [batch.take(pa.array(order[batch_numbers == i] - ends[i] + len(batch))) for i, batch in enumerate(batches)]
    back = np.argsort(np.argsort(batch_numbers, kind="stable"))
    return pa.Table.from_batches(parts).combine_chunks().take(pa.array(back))


# -- keys -------------------------------------------------------------------------------------------------------------

KEY = "dstune row key"
_KEYS = np.dtype([("high", ">u8"), ("low", ">u8")])


def row_keys(table: Any) -> Any:
    """Return the key of each row of a table: [rows] of two big-endian numbers."""
    digests = b"".join(row_key(row) for batch in table.to_batches(max_chunksize=1024) for row in batch.to_pylist())
    return np.frombuffer(digests, _KEYS).astype([("high", np.uint64), ("low", np.uint64)])


def row_key(row: Mapping[str, Any]) -> bytes:
    """Return a 16-byte digest of a row's values. A column or struct field without a value does not count, so adding one to a table
    moves no row."""
    values = _without_absent(row)
    text = json.dumps(values, sort_keys=True, ensure_ascii=True, separators=(",", ":"), default=_other)
    return xxhash.xxh3_128_digest(text.encode())


def _without_absent(value: Any) -> Any:
    """Return `value` without null fields of structs; entries of lists and pairs of maps keep their places."""
    if isinstance(value, Mapping):
        return {name: _without_absent(part) for name, part in value.items() if part is not None}
    if isinstance(value, (list, tuple)):
        return [_without_absent(part) for part in value]
    return value


def _other(value: Any) -> Any:
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    if hasattr(value, "isoformat"):
        return {type(value).__name__: value.isoformat()}
    return {type(value).__name__: str(value)}


def _sorted(keys: Any) -> Any:
    return np.lexsort((keys["low"], keys["high"]))


def _range_of(keys: Any, ranges: int) -> Any:
    """Return the range of each key, by its first bits. ranges: a power of two."""
    bits = ranges.bit_length() - 1
    return keys["high"] >> np.uint64(64 - bits) if bits else np.zeros(len(keys), np.uint64)


def _as_column(keys: Any) -> Any:
    return pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(16), len(keys), [None, pa.py_buffer(keys.astype(_KEYS).tobytes())]
    )


def _from_column(column: Any) -> Any:
    data = b"".join(value for value in column.to_pylist())
    return np.frombuffer(data, _KEYS).astype([("high", np.uint64), ("low", np.uint64)])


# -- types ------------------------------------------------------------------------------------------------------------


def plain_schema(schema: Any) -> Any:
    """Return `schema` without views and dictionaries, which Parquet files do not preserve."""
    return pa.schema([pa.field(field.name, _plain_type(field.type), field.nullable) for field in schema])


def _plain_type(arrow_type: Any) -> Any:
    if pa.types.is_dictionary(arrow_type):
        return _plain_type(arrow_type.value_type)
    if (
        pa.types.is_timestamp(arrow_type) and arrow_type.tz is not None
    ):  # equal instants in different time zones are the same row
        return pa.timestamp(arrow_type.unit, "UTC")
    if pa.types.is_string_view(arrow_type):
        return pa.large_string()
    if pa.types.is_binary_view(arrow_type):
        return pa.large_binary()
    if (
        pa.types.is_list(arrow_type)
        or pa.types.is_large_list(arrow_type)
        or pa.types.is_list_view(arrow_type)
        or pa.types.is_large_list_view(arrow_type)
    ):
        return pa.large_list(_plain_type(arrow_type.value_type))
    if pa.types.is_struct(arrow_type):
        return pa.struct([pa.field(field.name, _plain_type(field.type), field.nullable) for field in arrow_type])
    if pa.types.is_map(arrow_type):
        return pa.map_(_plain_type(arrow_type.key_type), _plain_type(arrow_type.item_type))
    return arrow_type


def _plain(batch: Any, schema: Any) -> Any:
    columns = [
        column if column.type == field.type else _cast(column, field.type)
        for column, field in zip(batch.columns, schema, strict=True)
    ]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _cast(column: Any, to: Any) -> Any:
    # pyarrow 26 silently casts lists that are views to wrong ones: [[1, 2], [3]] to [[1, 2], []].
    return pa.array(column.to_pylist(), to) if "list_view" in str(column.type) else column.cast(to)
