"""Tombstones of users whose rows were deleted."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Make the table."""
    op.create_table(
        "forgotten",
        sa.Column("user_digest", sa.String(64), primary_key=True),
        sa.Column("forgotten_at", sa.BigInteger, nullable=False),
    )
