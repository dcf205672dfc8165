"""Releases, the experiment that a recommendation belongs to, and what shadows would have shown."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Make the tables and the column; older recommendations belong to no experiment."""
    op.add_column("recommendations", sa.Column("experiment", sa.Integer))
    op.create_table(
        "shadow_choices",
        sa.Column("request_id", sa.String(64), primary_key=True),
        sa.Column("policy", sa.Text, nullable=False),
        sa.Column("slate", sa.Text, nullable=False),
        sa.Column("log_probs", sa.Text, nullable=False),
    )
    op.create_table(
        "releases",
        sa.Column("loop", sa.String(64), primary_key=True),
        sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("experiment", sa.Integer, nullable=False),
        sa.Column("released_at", sa.BigInteger, nullable=False),
        sa.Column("action", sa.String(16), nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("champion", sa.Text, nullable=False),
        sa.Column("challenger", sa.Text),
        sa.Column("challenger_share", sa.Float, nullable=False),
        sa.Column("baseline", sa.Text),
        sa.Column("baseline_share", sa.Float, nullable=False),
        sa.Column("shadow", sa.Text),
        sa.Column("salt", sa.String(64), nullable=False),
        sa.Column("planned_sessions", sa.Integer),
    )
