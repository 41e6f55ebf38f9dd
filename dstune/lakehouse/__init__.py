"""What dstune shares with a lakehouse: Delta tables as rows, Spark as a launcher, MLflow's registry of models.

`delta://PATH` and `uc://CATALOG.SCHEMA.TABLE` both lead to a Delta table. `tables.py` opens one at a version and reads it
through `DeltaTable.scan()` alone: the other readers of the library give nulls for mapped columns, or rows that were deleted.
`ordered.py` writes the rows in the order of their content, which no maintenance of the table changes. `copies.py` keeps them in
the cache. `spark/` is launch=spark, `register.py` is `dstune export --register`.
"""
