"""Alembic's entry point. Migrations run on the connection they are given, inside its transaction."""

from __future__ import annotations

from typing import Any, Literal

from alembic import context
from sqlalchemy import Enum

from control_plane.database import UtcDateTime
from control_plane.tables import metadata


def _plain(kind: str, item: Any, autogenerate: Any) -> str | Literal[False]:
    """Our own column types as what they are in the database: a migration must not change with the code."""
    if kind == "type" and isinstance(item, UtcDateTime):
        return "sa.DateTime(timezone=True)"
    if kind == "type" and isinstance(item, Enum):
        return f"sa.String(length={item.length})"
    return False


context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    render_item=_plain,
    # SQLite changes tables by copying them.
    render_as_batch=True,
)
with context.begin_transaction():
    context.run_migrations()
