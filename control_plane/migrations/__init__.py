"""The schema's history. `upgrade` brings a database up to date; every process does it at its start."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, text

from control_plane.database import Database

_LOCK = 0x6270_7573
"""Of PostgreSQL, so that two processes that start together do not migrate together."""


def config(connection: Connection) -> Config:
    """Alembic's configuration for one connection."""
    settings = Config()
    settings.set_main_option("script_location", str(Path(__file__).parent))
    settings.attributes["connection"] = connection
    return settings


async def upgrade(database: Database) -> None:
    """Bring the schema to the newest version."""
    async with database.engine.begin() as connection:
        if not database.is_sqlite:
            await connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})
        await connection.run_sync(lambda sync: command.upgrade(config(sync), "head"))
