"""Seconds owed and seconds missed, which tell the share of seconds that a pledge was sold."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"

_ZERO = sa.text("0")


def upgrade() -> None:
    # Counted by nodes from now on: rows of before have none.
    for table in ("seat_counters", "throughput_minutes"):
        for column in ("owed_seconds", "missed_seconds"):
            op.add_column(table, sa.Column(column, sa.BigInteger(), nullable=False, server_default=_ZERO))
