"""Run by alembic on the connection that `Database` passes."""

from alembic import context

from dstune.serve.store.tables import Table

context.configure(
    connection=context.config.attributes["connection"], target_metadata=Table.metadata, render_as_batch=True
)
with context.begin_transaction():
    context.run_migrations()
