"""What tests of the control plane stand on: real databases, a clock that they own, rows to begin with.

Every test that takes `database`, or what is made of it, runs twice: on an SQLite file and on a
PostgreSQL server of our own, which starts with the first test that needs it. Each gets a fresh copy of
one migrated database.
"""

from __future__ import annotations

import asyncio
import datetime
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import APIRouter, FastAPI
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from contract.blocks import Block
from contract.keys import KeyKind, key_sha256, new_key
from contract.nodes import ServingState
from control_plane.accounts.tables import Account, ManagementKey, Role
from control_plane.billing.ledger_gateway import LedgerGateway
from control_plane.body_limit import BodyLimit
from control_plane.context import ControlPlane
from control_plane.database import Database, async_url, new_id
from control_plane.envelope import install_error_handlers
from control_plane.keys.tables import BoostKey
from control_plane.migrations import upgrade
from control_plane.nodes.tables import Node
from control_plane.pledges.tables import Pledge, PledgeState
from control_plane.pools.tables import Pool, PoolState
from control_plane.vault import Vault
from serving.family import stop_with_parent

NOON = datetime.datetime(2026, 3, 10, 12, 0, tzinfo=datetime.UTC)
TEMPLATE = "migrated"
_START_S = 30.0
_ROOM_BYTES = 1 << 30


class ManualClock:
    """A clock that stands still until it is told otherwise."""

    def __init__(self, now: datetime.datetime = NOON) -> None:
        self.now = now

    def __call__(self) -> datetime.datetime:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += datetime.timedelta(seconds=seconds)


async def make_schema(url: str) -> None:
    """Bring an empty database to where the control plane finds it at its start."""
    database = Database(url)
    try:
        await upgrade(database)
    finally:
        await database.close()


# --- databases -----------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """A throwaway PostgreSQL server, behind a socket in its own folder; skips where it is missing."""
    if shutil.which("pg_config") is None:
        pytest.skip("PostgreSQL is not installed (Debian: apt-get install postgresql): not tested on it")
    asked = subprocess.run(["pg_config", "--bindir"], check=True, capture_output=True, text=True)  # noqa: S607
    programs = Path(asked.stdout.strip())
    # The server refuses to be root, and an ordinary user cannot be anybody else.
    identity: dict[str, Any] = {"user": "postgres", "group": "postgres", "extra_groups": []}
    if os.geteuid() != 0:
        identity = {}
    # Making a database per test is ten times faster in memory than on a disk.
    memory = Path("/dev/shm")  # noqa: S108 - the folder in it has an unforeseeable name
    roomy = memory.is_dir() and shutil.disk_usage(memory).free > _ROOM_BYTES
    with tempfile.TemporaryDirectory(prefix="boosts-pg-", dir=memory if roomy else None) as folder:
        if identity:
            shutil.chown(folder, "postgres", "postgres")
        data = f"{folder}/data"
        subprocess.run(
            [programs / "initdb", "-D", data, "-U", "boosts", "-A", "trust", "-E", "UTF8", "--no-sync"],
            check=True,
            capture_output=True,
            cwd=folder,
            **identity,
        )
        settings = ("listen_addresses=", "fsync=off", "synchronous_commit=off", "full_page_writes=off")
        server = subprocess.Popen(
            [
                programs / "postgres",
                *("-D", data, "-k", folder),
                *(word for each in settings for word in ("-c", each)),
            ],
            cwd=folder,
            stderr=subprocess.DEVNULL,
            preexec_fn=stop_with_parent,  # noqa: PLW1509 - no other thread holds a lock of the loader's
            **identity,
        )
        try:
            _await_ready([str(programs / "pg_isready"), "-q", "-h", folder])
            yield f"postgresql://boosts@/postgres?host={folder}"
        finally:
            server.terminate()
            server.wait()


def _await_ready(probe: Sequence[str]) -> None:
    deadline = time.monotonic() + _START_S
    while subprocess.run(probe, check=False).returncode != 0:
        assert time.monotonic() < deadline, f"PostgreSQL did not start within {_START_S:.0f} s"
        time.sleep(0.02)


@pytest.fixture(scope="session")
def postgres_template(postgres_url: str) -> str:
    """The server's URL, once it has a migrated database to copy."""
    _run(_administer(postgres_url, f'CREATE DATABASE "{TEMPLATE}"'))
    _run(make_schema(postgres_url.replace("/postgres?", f"/{TEMPLATE}?")))
    return postgres_url


async def _administer(server_url: str, command: str) -> None:
    engine = create_async_engine(async_url(server_url), isolation_level="AUTOCOMMIT")
    async with engine.connect() as connection:
        await connection.execute(text(command))
    await engine.dispose()


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated SQLite file to copy."""
    path = tmp_path_factory.mktemp("sqlite") / f"{TEMPLATE}.db"
    _run(make_schema(f"sqlite:///{path}"))
    return path


def _run(task: Coroutine[Any, Any, None]) -> None:
    """Run it on an event loop of its own, whatever loop the test has."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        thread.submit(asyncio.run, task).result()


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A migrated database of the test's own, of each kind in turn."""
    if request.param == "sqlite":
        path = tmp_path / "control-plane.db"
        shutil.copy(request.getfixturevalue("sqlite_template"), path)
        yield f"sqlite:///{path}"
        return
    server_url: str = request.getfixturevalue("postgres_template")
    name = new_id()
    _run(_administer(server_url, f'CREATE DATABASE "{name}" TEMPLATE "{TEMPLATE}"'))
    yield server_url.replace("/postgres?", f"/{name}?")
    _run(_administer(server_url, f'DROP DATABASE "{name}" WITH (FORCE)'))


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    database = Database(database_url)
    yield database
    await database.close()


# --- the control plane ---------------------------------------------------------------------------


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def control_plane(database: Database, clock: ManualClock) -> ControlPlane:
    """A control plane on the database and the clock, with the embedded gateway."""
    return ControlPlane(
        database=database,
        clock=clock,
        gateway=LedgerGateway(database, clock),
        vault=Vault(bytes(32)),
        public_url="http://control-plane.test",
    )


def app_of(context: ControlPlane, *routers: APIRouter) -> FastAPI:
    """An application of just these routers, in the envelope."""
    app = FastAPI(redirect_slashes=False)
    app.state.control_plane = context
    app.state.stopping = asyncio.Event()
    install_error_handlers(app)
    app.add_middleware(BodyLimit)
    for router in routers:
        app.include_router(router)
    return app


def client_of(app: FastAPI, key: str | None = None) -> httpx.AsyncClient:
    """A client of the application that sends this key, or none."""
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    return httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://control-plane.test", headers=headers
    )


# --- rows ----------------------------------------------------------------------------------------


async def add_account(database: Database, role: Role = Role.CUSTOMER) -> tuple[Account, str]:
    """An account and its management key."""
    key = new_key(KeyKind.MANAGEMENT)
    account = Account(id=new_id(), name="Ada", email=f"{new_id()}@example.com", role=role, created_at=NOON)
    async with database.write() as session:
        session.add(account)
        await session.flush()
        session.add(ManagementKey(account_id=account.id, key_sha256=key_sha256(key), created_at=NOON))
    return account, key


async def add_pool(database: Database, state: PoolState = PoolState.ACTIVE, **changes: Any) -> Pool:
    """A pool; its blocks and seats only where a test makes them."""
    fields: dict[str, Any] = {
        "id": new_id(),
        "slug": f"pool-{new_id()}",
        "model_id": "org/model",
        "model_name": "Model",
        "description": "",
        "infra_spec": "",
        "state": state,
        "min_seats": 1,
        "guarantee_tok_s": 10.0,
        "prefill_tok_s": 1000.0,
        "rpm_limit": 60,
        "tpm_limit": 100_000,
        "engine_flags": ["--max-num-seqs", "8"],
        "created_at": NOON,
    }
    pool = Pool(**(fields | changes))
    async with database.write() as session:
        session.add(pool)
    return pool


async def add_node(database: Database, pool: Pool, **changes: Any) -> tuple[Node, str]:
    """A node that is ready at noon, with epoch 1, and its token."""
    token = new_key(KeyKind.NODE)
    fields: dict[str, Any] = {
        "id": new_id(),
        "pool_id": pool.id,
        "name": "gpu-1",
        "token_sha256": key_sha256(token),
        "epoch": 1,
        "boot_id": "boot",
        "base_url": "http://gpu-1:8000",
        "created_at": NOON,
        "heard_at": NOON,
        "serving": ServingState.READY,
        "model_id": pool.model_id,
    }
    node = Node(**(fields | changes))
    async with database.write() as session:
        session.add(node)
    return node, token


async def add_pledge(
    database: Database, pool: Pool, node: Node | None = None, account: Account | None = None, **changes: Any
) -> Pledge:
    """An active pledge with a key: one seat of the night block, of an account of its own."""
    if account is None:
        account, _ = await add_account(database)
    fields: dict[str, Any] = {
        "id": new_id(),
        "account_id": account.id,
        "pool_id": pool.id,
        "node_id": None if node is None else node.id,
        "state": PledgeState.ACTIVE,
        "blocks": [Block.NIGHT.value],
        "quantity": 1,
        "price_cents": 2700,
        "created_at": NOON,
        "billing_anchor": NOON,
        "periods": 1,
        "current_period_end": NOON + datetime.timedelta(days=31),
    }
    pledge = Pledge(**(fields | changes))
    async with database.write() as session:
        session.add(pledge)
        await session.flush()
        key = BoostKey(
            pledge_id=pledge.id,
            key_sha256=key_sha256(new_key(KeyKind.BOOST)),
            encrypted=b"",
            created_at=NOON,
        )
        session.add(key)
    return pledge
