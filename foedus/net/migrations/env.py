"""Alembic's entry: migrations run on the connection that ``store.py`` has opened."""

from alembic import context

from foedus.net.tables import METADATA

connection = context.config.attributes["connection"]
context.configure(connection=connection, target_metadata=METADATA, render_as_batch=True, transactional_ddl=True)
context.run_migrations()
