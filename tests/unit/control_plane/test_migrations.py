"""The tables in the code and those that the migrations make are the same, however often they are made."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, inspect, select, text

from control_plane.database import Database, DatabaseError, async_url
from control_plane.migrations import config, upgrade
from control_plane.nodes.tables import Node
from control_plane.pledges.tables import Pledge
from control_plane.pools.tables import Pool
from control_plane.tables import metadata
from control_plane.throughput.tables import SeatCounters, ThroughputMinute

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


_BEFORE_CAPACITY = """
INSERT INTO pools (id, slug, model_id, model_name, description, infra_spec, state, min_seats,
    guarantee_tok_s, prefill_tok_s, rpm_limit, tpm_limit, engine_flags, revision, activation, created_at)
    VALUES ('pool', 'a', 'm', 'M', '', '', 'active', 1, 20, 1000, 60, 1000, '[]', 7, 1,
    '2026-01-01 00:00:00');
INSERT INTO accounts (id, name, email, role, created_at)
    VALUES ('account', 'A', 'a@example.com', 'customer', '2026-01-01 00:00:00');
INSERT INTO nodes (id, pool_id, name, token_sha256, draining, retired, epoch, created_at, serving, revision,
    restarts, spooled_reports, gpus)
    VALUES ('node', 'pool', 'gpu', 'hash', FALSE, FALSE, 3, '2026-01-01 00:00:00', 'ready', 7, 0, 0, '[]');
INSERT INTO pledges (id, account_id, pool_id, node_id, state, blocks, quantity, price_cents, created_at,
    periods, cancel_at_period_end, failed_renewals, retry_now)
    VALUES ('pledge', 'account', 'pool', 'node', 'active', '["night"]', 1, 2700, '2026-01-01 00:00:00',
    1, FALSE, 0, FALSE);
INSERT INTO seat_counters VALUES ('node', 'boot', 'pledge', 1, 2, 3, 4.5, 0.5);
INSERT INTO throughput_minutes VALUES ('pledge', '2026-01-01 00:00:00', 1, 2, 3, 4.5, 0.5)
"""
"""What a live pool has written by revision 0001."""


async def test_a_live_database_of_the_first_revision_keeps_what_is_in_it(empty_url: str) -> None:
    database = Database(empty_url)
    try:
        async with database.engine.begin() as connection:
            await connection.run_sync(lambda sync: command.upgrade(config(sync), "0001"))
            for statement in _BEFORE_CAPACITY.split(";"):
                await connection.execute(text(statement))
        await upgrade(database)
        assert await differences(database) == []
        async with database.read() as session:
            pool = await session.get_one(Pool, "pool")
            assert (pool.revision, pool.nodes, pool.context_tokens) == (7, 1, 2_048)
            assert (pool.capacity_margin, pool.declared_capacity) == (0.1, None)
            node = await session.get_one(Node, "node")
            assert (node.epoch, node.capacity, node.capacity_at) == (3, None, None)
            assert (await session.get_one(Pledge, "pledge")).node_id == "node"
            [counters] = await session.scalars(select(SeatCounters))
            assert (counters.owed_tokens, counters.borrowed_tokens, counters.held_s) == (4.5, 0, 0)
            assert (counters.owed_seconds, counters.missed_seconds) == (0, 0)
            [minute] = await session.scalars(select(ThroughputMinute))
            assert (minute.output_tokens, minute.borrowed_tokens, minute.attainment_60s) == (3, 0, None)
            assert (minute.owed_seconds, minute.missed_seconds) == (0, 0)
    finally:
        await database.close()


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
