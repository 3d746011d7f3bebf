"""What nodes can do, and the rest of the ledger: borrowed, held, and attainment by window."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

_ZERO = sa.text("0")


def upgrade() -> None:
    # Rows of before get what a pool has that says nothing, and counters that have counted nothing. Columns are
    # added in place: SQLite would otherwise copy the tables, and drop those that others refer to.
    op.add_column("pools", sa.Column("nodes", sa.Integer(), nullable=False, server_default=sa.text("1")))
    op.add_column(
        "pools", sa.Column("context_tokens", sa.Integer(), nullable=False, server_default=sa.text("2048"))
    )
    op.add_column(
        "pools", sa.Column("capacity_margin", sa.Float(), nullable=False, server_default=sa.text("0.1"))
    )
    op.add_column("pools", sa.Column("declared_capacity", sa.JSON(), nullable=True))
    op.add_column("nodes", sa.Column("capacity", sa.JSON(), nullable=True))
    op.add_column("nodes", sa.Column("capacity_at", sa.DateTime(timezone=True), nullable=True))
    for table in ("seat_counters", "throughput_minutes"):
        op.add_column(table, sa.Column("borrowed_tokens", sa.Float(), nullable=False, server_default=_ZERO))
        op.add_column(table, sa.Column("held_s", sa.Float(), nullable=False, server_default=_ZERO))
    for window in ("1s", "10s", "60s"):
        op.add_column("throughput_minutes", sa.Column(f"attainment_{window}", sa.Float(), nullable=True))
