"""DataFrames of Spark as rows: `dstune.train(train=spark.table("main.reviews.films"))`."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dstune.core.errors import Problem, UserError, first_line
from dstune.protocols import DataSource, data_source


@data_source
class SparkFrames(DataSource):
    name = "spark.table"

    def holds(self, rows: Any) -> bool:
        return type(rows).__module__.startswith("pyspark.sql.") and hasattr(rows, "toLocalIterator")

    def save(self, rows: Any, file: Path, key: str) -> int:
        # Spark guarantees no order: the rows are written in the order of their content, with a part of them in memory at a time.
        import pyarrow

        from dstune.api.rows import refuse_doubles
        from dstune.lakehouse.ordered import write_ordered

        refuse_doubles(rows.columns, key)

        def batches() -> Iterator[Any]:
            try:
                schema = rows.limit(0).toArrow().schema
                iterator = (row.asDict(recursive=True) for row in rows.toLocalIterator())
                while block := list(itertools.islice(iterator, 1024)):
                    plain = [{field.name: _of_type(row[field.name], field.type) for field in schema} for row in block]
                    yield pyarrow.RecordBatch.from_pylist(plain, schema=schema)
            except Exception as error:  # from Java, py4j, pyspark or pyarrow
                fix = "select columns of text, numbers, times, lists and structs"
                raise UserError(Problem(key, f"Spark does not give the rows: {first_line(error)}", fix)) from None

        with tempfile.TemporaryDirectory(prefix="dstune-", dir=file.parent) as scratch:
            return write_ordered(batches(), file, Path(scratch), 2**31).rows


def _of_type(value: Any, arrow_type: Any) -> Any:
    """Convert a value from Spark to one that pyarrow accepts: Spark returns timestamps in this machine's time zone without marking
    it, and maps as mappings."""
    from datetime import UTC

    from pyarrow import types

    if value is None:
        return None
    if types.is_timestamp(arrow_type):
        return value.astimezone(UTC) if arrow_type.tz else value
    if types.is_list(arrow_type) or types.is_large_list(arrow_type):
        return [_of_type(item, arrow_type.value_type) for item in value]
    if types.is_struct(arrow_type):
        return {field.name: _of_type(value.get(field.name), field.type) for field in arrow_type}
    if types.is_map(arrow_type):
        return [
            (_of_type(name, arrow_type.key_type), _of_type(item, arrow_type.item_type)) for name, item in value.items()
        ]
    return value
