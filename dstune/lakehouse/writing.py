"""Writes rows into a Delta table in one idempotent transaction."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dstune.core.errors import Problem, UserError, first_line
from dstune.lakehouse.address import Address

ROWS_PER_BATCH = 1024


def write_rows(
    place: str, address: Address, rows: Path, identity: str, *, replace: bool, options: Mapping[str, str] | None = None
) -> str:
    """Append the JSON lines of `rows` to the table at `place`, creating it if it is missing, or replace its rows. Returns what was
    done. Raises UserError, in which case nothing has been written."""
    import pyarrow as pa
    from deltalake import CommitProperties, DeltaTable, Transaction, write_deltalake

    storage_options = dict(options) if options else None
    application = f"dstune-{identity}"
    earlier = None
    try:
        if DeltaTable.is_deltatable(place, storage_options):
            earlier = DeltaTable(place, storage_options=storage_options).transaction_version(application)
        if earlier is not None and not replace:
            return f"{address} got these rows already: nothing is written (--force replaces its rows)"
        schema = _schema(rows)
        reader = pa.RecordBatchReader.from_batches(schema, _batches(rows, schema))
        write_deltalake(
            place,
            reader,
            mode="overwrite" if replace else "append",
            storage_options=storage_options,
            commit_properties=CommitProperties(
                custom_metadata={"writtenBy": "dstune predict"},
                app_transactions=[Transaction(application, (earlier or 0) + 1)],
            ),
        )
        version = DeltaTable(place, storage_options=storage_options).version()
    except Exception as error:
        reason = f"cannot be written: {first_line(error)}"
        fix = "another table; its columns have to be those of the answers (--force replaces its rows)"
        raise UserError(Problem("--output", reason, fix, str(address))) from None
    return f"{address}@{version}"


def _lines(rows: Path) -> Iterator[list[dict[str, Any]]]:
    block: list[dict[str, Any]] = []
    with rows.open(encoding="utf-8") as stream:
        for line in stream:
            block.append(json.loads(line))
            if len(block) == ROWS_PER_BATCH:
                yield block
                block = []
    if block:
        yield block


def _schema(rows: Path) -> Any:
    """Return the common schema of all rows; a column without any value is text."""
    import pyarrow as pa

    schemas = (_table(block, None).schema for block in _lines(rows))
    merged = next(schemas)
    for schema in schemas:
        merged = pa.unify_schemas([merged, schema], promote_options="permissive")
    return pa.schema([pa.field(field.name, _with_values(field.type)) for field in merged])


def _table(block: list[dict[str, Any]], schema: Any) -> Any:
    import pyarrow as pa

    names = list(dict.fromkeys(name for row in block for name in row)) if schema is None else schema.names
    return pa.Table.from_pylist([{name: row.get(name) for name in names} for row in block], schema=schema)


def _with_values(arrow_type: Any) -> Any:
    import pyarrow as pa

    if pa.types.is_null(arrow_type):
        return pa.string()
    if pa.types.is_list(arrow_type):
        return pa.list_(_with_values(arrow_type.value_type))
    if pa.types.is_struct(arrow_type):
        return pa.struct([pa.field(field.name, _with_values(field.type)) for field in arrow_type])
    return arrow_type


def _batches(rows: Path, schema: Any) -> Iterator[Any]:
    for block in _lines(rows):
        yield from _table(block, schema).to_batches()
