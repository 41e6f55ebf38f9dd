"""Tables of a lakehouse as rows: `delta://PATH` and `uc://CATALOG.SCHEMA.TABLE`, each a room.

Both lead to a Delta table. `_tables.py` opens one at a version and reads it through `DeltaTable.scan()` alone: the other
readers of the library give nulls for mapped columns, or rows that were deleted. `_ordered.py` writes the rows in the order of
their content, which no maintenance of the table changes. `_copies.py` keeps them in the cache.
"""
