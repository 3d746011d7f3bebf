"""The tables in the code and those that the migrations make are the same, however often they are made."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, inspect, text

from control_plane.database import Database, DatabaseError, async_url
from control_plane.migrations import upgrade
from control_plane.tables import metadata

pytestmark = pytest.mark.slow


async def names(database: Database) -> set[str]:
    async with database.engine.connect() as connection:
        return set(await connection.run_sync(lambda sync: inspect(sync).get_table_names()))


async def differences(database: Database) -> list[object]:
    def compare(connection: Connection) -> list[object]:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        return list(compare_metadata(context, metadata))

    async with database.engine.connect() as connection:
        return await connection.run_sync(compare)


async def store_ids(database: Database) -> list[str]:
    async with database.engine.connect() as connection:
        return list((await connection.execute(text("SELECT id FROM store"))).scalars())


@pytest.fixture
async def empty_url(request: pytest.FixtureRequest, database_url: str, tmp_path: Path) -> str:
    """A database of the same kind in which nothing is."""
    if database_url.startswith("sqlite"):
        return f"sqlite:///{tmp_path / 'empty.db'}"
    database = Database(database_url)
    async with database.engine.begin() as connection:
        await connection.execute(text("DROP SCHEMA public CASCADE"))
        await connection.execute(text("CREATE SCHEMA public"))
    await database.close()
    return database_url


async def test_migrations_make_the_tables_that_the_code_uses(database: Database) -> None:
    assert await names(database) == {*metadata.tables, "alembic_version"}
    assert await differences(database) == []


async def test_partial_indexes_are_made_as_such(database: Database) -> None:
    """compare_metadata does not look at their conditions."""
    for index, condition in (
        ("uq_pledges_open", "state != 'canceled'"),
        ("uq_reservations_open_seat", "released_at IS NULL"),
    ):
        catalogue = "sqlite_master" if database.is_sqlite else "pg_indexes"
        columns = ("sql", "name") if database.is_sqlite else ("indexdef", "indexname")
        async with database.engine.connect() as connection:
            query = text(f"SELECT {columns[0]} FROM {catalogue} WHERE {columns[1]} = :name")  # noqa: S608
            [definition] = (await connection.execute(query, {"name": index})).scalars()
        plain = definition.replace("::text", "").replace("(", "").replace(")", "").replace("<>", "!=")
        assert "UNIQUE" in definition
        assert condition in plain


async def test_upgrading_again_changes_nothing(database: Database) -> None:
    before = await names(database), await store_ids(database)
    await upgrade(database)
    await upgrade(database)
    assert (await names(database), await store_ids(database)) == before
    assert len(before[1]) == 1
    assert await differences(database) == []


async def test_processes_that_start_together_upgrade_once(empty_url: str) -> None:
    program = (
        "import asyncio, sys\n"
        "from control_plane.database import Database\n"
        "from control_plane.migrations import upgrade\n"
        "async def main():\n"
        "    database = Database(sys.argv[1])\n"
        "    await upgrade(database)\n"
        "    await database.close()\n"
        "asyncio.run(main())\n"
    )
    processes = [
        await asyncio.create_subprocess_exec(sys.executable, "-c", program, empty_url, stderr=subprocess.PIPE)
        for _ in range(3)
    ]
    for process in processes:
        _, errors = await process.communicate()
        assert process.returncode == 0, errors.decode()
    database = Database(empty_url)
    try:
        assert len(await store_ids(database)) == 1
        assert await differences(database) == []
    finally:
        await database.close()


def test_urls_get_the_drivers_that_we_use() -> None:
    assert async_url("sqlite:////tmp/a.db") == "sqlite+aiosqlite:////tmp/a.db"
    assert async_url("postgresql://u:p@h/d") == "postgresql+asyncpg://u:p@h/d"
    assert async_url("postgresql+asyncpg://u:p@h/d") == "postgresql+asyncpg://u:p@h/d"


@pytest.mark.parametrize("url", ["", "nonsense", "mysql://u:secret@h/d", "postgres:u:secret"])
def test_other_databases_are_refused_without_a_word_about_their_passwords(url: str) -> None:
    with pytest.raises(DatabaseError) as raised:
        async_url(url)
    assert "secret" not in str(raised.value)
