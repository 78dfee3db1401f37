"""Run by Alembic, within a connection that `Database.migrate` has begun a transaction on."""

from alembic import context
from quire_cluster.governance.tables import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
with context.begin_transaction():
    context.run_migrations()
