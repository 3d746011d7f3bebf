"""The database: SQLite embedded, PostgreSQL for more, behind two kinds of transaction.

`write()` and `read()` give a session inside one transaction. On SQLite a write begins with BEGIN
IMMEDIATE, because its default would let two writers read the same free seat and both sell it; one
connection makes writers wait their turn here instead of failing on a busy file. On PostgreSQL rows
are locked explicitly, the pool's row always first (`control_plane.pools.service.lock`).
"""

from __future__ import annotations

import datetime
import enum
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from sqlalchemy import DateTime, Dialect, Enum, MetaData, event
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase
from sqlalchemy.types import TypeDecorator

_BUSY_TIMEOUT_S = 15
_READERS = 8


class UtcDateTime(TypeDecorator[datetime.datetime]):
    """A moment in UTC; SQLite, which knows no zones, keeps it without one."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(
        self, value: datetime.datetime | None, dialect: Dialect
    ) -> datetime.datetime | None:
        if value is None:
            return None
        assert value.tzinfo is not None, "moments carry their zone"
        return value.astimezone(datetime.UTC)

    def process_result_value(
        self, value: datetime.datetime | None, dialect: Dialect
    ) -> datetime.datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=datetime.UTC) if value.tzinfo is None else value.astimezone(datetime.UTC)


class Table(DeclarativeBase):
    """Base of all tables. Constraints get names, so that migrations can speak of them."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(column_0_label)s",
            "uq": "uq_%(table_name)s_%(column_0_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {datetime.datetime: UtcDateTime}  # noqa: RUF012 - SQLAlchemy's own interface


Member = TypeVar("Member", bound=enum.Enum)


def stored_enum(members: type[Member]) -> Enum:
    """An enum as its values in a text column: a new member needs no change of a database type."""
    return Enum(
        members,
        native_enum=False,
        create_constraint=False,
        length=20,
        values_callable=lambda kind: [member.value for member in kind],
    )


def new_id() -> str:
    """A fresh identifier: a random UUID."""
    return str(uuid.uuid4())


class DatabaseError(Exception):
    """The database cannot be used; the message says what to do."""


class Database:
    """Connections to one database. `url` is SQLAlchemy's, with or without the asynchronous driver's name."""

    def __init__(self, url: str) -> None:
        self.url = async_url(url)
        self.is_sqlite = self.url.startswith("sqlite")
        if self.is_sqlite:
            options: dict[str, Any] = {"connect_args": {"timeout": _BUSY_TIMEOUT_S}, "max_overflow": 0}
            self._writer = create_async_engine(self.url, pool_size=1, **options)
            self._reader = create_async_engine(self.url, pool_size=_READERS, **options)
            _prepare_sqlite(self._writer, "BEGIN IMMEDIATE")
            _prepare_sqlite(self._reader, "BEGIN")
        else:
            self._writer = self._reader = create_async_engine(self.url, pool_size=10, pool_pre_ping=True)

    @asynccontextmanager
    async def write(self) -> AsyncIterator[AsyncSession]:
        """One transaction that may change things: committed at the end, rolled back by an exception."""
        async with AsyncSession(self._writer, expire_on_commit=False) as session, session.begin():
            yield session

    @asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncSession]:
        """One transaction that sees a state and changes nothing."""
        async with AsyncSession(self._reader, expire_on_commit=False) as session:
            yield session

    @property
    def engine(self) -> AsyncEngine:
        """For migrations."""
        return self._writer

    async def close(self) -> None:
        await self._writer.dispose()
        await self._reader.dispose()


def async_url(url: str) -> str:
    """The URL with the driver that we use. Raises DatabaseError for databases that we do not know."""
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise DatabaseError(
            "BOOSTS_DATABASE_URL is no database URL; want sqlite:////path/to/file or "
            "postgresql://user:password@host/name"
        ) from None
    drivers = {"sqlite": "sqlite+aiosqlite", "postgresql": "postgresql+asyncpg"}
    backend = parsed.get_backend_name()
    if backend not in drivers:
        raise DatabaseError(f"{backend} is not supported; use SQLite or PostgreSQL")
    return parsed.set(drivername=drivers[backend]).render_as_string(hide_password=False)


def _prepare_sqlite(engine: AsyncEngine, begin: str) -> None:
    @event.listens_for(engine.sync_engine, "connect")
    def connect(connection: Any, record: Any) -> None:
        # The driver would begin transactions by itself, and too late.
        connection.isolation_level = None
        cursor = connection.cursor()
        for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    @event.listens_for(engine.sync_engine, "begin")
    def start(connection: Any) -> None:
        connection.exec_driver_sql(begin)
