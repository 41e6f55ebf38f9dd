"""Delta tables whose logs are written by hand: what the library reads and does not write."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

Z85 = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#"


def _log(table: Path, actions: list[dict[str, Any]], version: int = 0) -> None:
    folder = table / "_delta_log"
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(action) + "\n" for action in actions)
    (folder / f"{version:020}.json").write_text(text)


def _metadata(fields: list[dict[str, Any]], configuration: dict[str, str]) -> dict[str, Any]:
    schema = {"type": "struct", "fields": fields}
    return {
        "metaData": {
            "id": "5fba94ed-9794-4965-ba6e-6ee3c0d22af9",
            "format": {"provider": "parquet", "options": {}},
            "schemaString": json.dumps(schema),
            "partitionColumns": [],
            "configuration": configuration,
            "createdTime": 1700000000000,
        }
    }


def _add(path: Path, rows: int, **fields: Any) -> dict[str, Any]:
    add = {"path": path.name, "partitionValues": {}, "size": path.stat().st_size, "modificationTime": 1700000000000}
    return {"add": {**add, "dataChange": True, "stats": json.dumps({"numRecords": rows}), **fields}}


def mapped_table(table: Path, rows: list[dict[str, str]]) -> Path:
    """Write a table whose columns have other names in its files (column mapping by name). Returns its folder."""
    table.mkdir(parents=True)
    physical = {"text": "col-5f4", "label": "col-a1b"}
    file = table / "part-0.parquet"
    fields = [
        pa.field(physical[name], pa.string(), metadata={"PARQUET:field_id": str(number)})
        for number, name in enumerate(physical, 1)
    ]
    columns = [pa.array([row[name] for row in rows]) for name in physical]
    pq.write_table(pa.Table.from_arrays(columns, schema=pa.schema(fields)), file)
    described = [
        {
            "name": name,
            "type": "string",
            "nullable": True,
            "metadata": {"delta.columnMapping.id": number, "delta.columnMapping.physicalName": physical[name]},
        }
        for number, name in enumerate(physical, 1)
    ]
    settings = {"delta.columnMapping.mode": "name", "delta.columnMapping.maxColumnId": "2"}
    protocol = {"protocol": {"minReaderVersion": 2, "minWriterVersion": 5}}
    _log(table, [protocol, _metadata(described, settings), _add(file, len(rows))])
    return table


def table_with_deletions(table: Path, rows: list[dict[str, str]], deleted: list[int]) -> Path:
    """Write a table of which some rows are deleted by a deletion vector in the log."""
    table.mkdir(parents=True)
    file = table / "part-0.parquet"
    pq.write_table(pa.Table.from_pylist(rows), file)
    # RoaringBitmapArray in its portable form: one bitmap of one array container.
    values = sorted(deleted)
    container = struct.pack(f"<{len(values)}H", *values)
    bitmap = struct.pack("<IIHHI", 12346, 1, 0, len(values) - 1, 16) + container
    data = struct.pack("<IQI", 1681511377, 1, 0) + bitmap
    vector = {"storageType": "i", "pathOrInlineDv": _z85(data), "sizeInBytes": len(data), "cardinality": len(values)}
    described = [{"name": name, "type": "string", "nullable": True, "metadata": {}} for name in rows[0]]
    features = {"readerFeatures": ["deletionVectors"], "writerFeatures": ["deletionVectors"]}
    protocol = {"protocol": {"minReaderVersion": 3, "minWriterVersion": 7, **features}}
    settings = {"delta.enableDeletionVectors": "true"}
    _log(table, [protocol, _metadata(described, settings), _add(file, len(rows), deletionVector=vector)])
    return table


def _z85(data: bytes) -> str:
    data += bytes(-len(data) % 4)
    text = ""
    for (value,) in struct.iter_unpack(">I", data):
        digits = []
        for _ in range(5):
            value, digit = divmod(value, 85)
            digits.append(Z85[digit])
        text += "".join(reversed(digits))
    return text
