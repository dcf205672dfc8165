"""Alembic's entry: migrations run on the connection that `InteractionLog.upgrade` hands over."""

from alembic import context

from components.interactions.log import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
context.run_migrations()
