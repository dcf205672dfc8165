"""Recommendations, the candidate lists that they share, and feedback."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Make the tables."""
    op.create_table(
        "recommendations",
        sa.Column("request_id", sa.String(64), primary_key=True),
        sa.Column("loop", sa.String(64), nullable=False),
        sa.Column("user_id", sa.String(64), nullable=False),
        sa.Column("session_id", sa.Text),
        sa.Column("shown_at", sa.BigInteger, nullable=False),
        sa.Column("candidates", sa.Text),
        sa.Column("candidates_digest", sa.String(64)),
        sa.Column("slate", sa.Text, nullable=False),
        sa.Column("log_probs", sa.Text, nullable=False),
        sa.Column("events", sa.Text, nullable=False),
        sa.Column("context", sa.Text, nullable=False),
        sa.Column("policy", sa.Text, nullable=False),
        sa.Column("arm", sa.String(64), nullable=False),
        sa.Column("idempotency_key", sa.Text),
        sa.Column("question", sa.String(64), nullable=False),
        sa.UniqueConstraint("loop", "idempotency_key", name="one_answer_per_key"),
    )
    op.create_index("recommendations_by_time", "recommendations", ["loop", "shown_at"])
    op.create_table(
        "candidate_lists",
        sa.Column("candidates_digest", sa.String(64), primary_key=True),
        sa.Column("candidates", sa.Text, nullable=False),
    )
    op.create_table(
        "feedback",
        sa.Column("request_id", sa.String(64), primary_key=True),
        sa.Column("feedback_id", sa.String(64), primary_key=True),
        sa.Column("received_at", sa.BigInteger, nullable=False),
        sa.Column("clicked", sa.Text),
        sa.Column("purchased", sa.Text),
        sa.Column("signals", sa.Text, nullable=False),
        sa.Column("request_signals", sa.Text, nullable=False),
        sa.Column("left", sa.Boolean, nullable=False),
    )
