"""Connects dstune to a lakehouse: Delta tables as rows, Spark as a launcher, MLflow's model registry. `delta://PATH` and
`uc://CATALOG.SCHEMA.TABLE` both lead to a Delta table. `tables.py` opens one at a version and reads it only through
`DeltaTable.scan()`: the library's other readers return nulls for mapped columns, or deleted rows. `ordered.py` writes the rows in
the order of their content, which table maintenance does not change. `copies.py` keeps them in the cache. `spark/` implements
launch=spark, `register.py` implements `dstune export --register`."""
