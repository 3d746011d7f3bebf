"""A market in a test's hands: operators, customers, pools and nodes, driven over the control plane's own API.

What a test is about goes through the ASGI application; what it stands on (accounts, cards, pools, nodes) is
put in place directly. The payment gateway can be told to fail.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import functools
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import aiosqlite
import httpx
import pytest
from fastapi import FastAPI
from sqlalchemy import event, select, text, update
from sqlalchemy.ext.asyncio import create_async_engine

from contract.keys import KeyKind, key_sha256, new_key
from contract.nodes import ServingState
from control_plane.accounts import service as accounts
from control_plane.accounts.service import new_operator_key
from control_plane.accounts.tables import Role
from control_plane.app import create_app
from control_plane.billing.gateway import Card, GatewayUnavailable, Outcome
from control_plane.billing.ledger_gateway import LedgerGateway
from control_plane.billing.tables import LedgerEntry, PaymentMethod
from control_plane.context import ControlPlane
from control_plane.database import Database, async_url, new_id
from control_plane.nodes.tables import Node
from control_plane.pledges.lifecycle import Lifecycle
from control_plane.pools import service as pools
from control_plane.pools.models import PoolTerms
from control_plane.pools.tables import Pool
from control_plane.tables import metadata
from control_plane.vault import Vault
from tests.contract.documents import capacity, measured
from tests.unit.control_plane.conftest import TEMPLATE, ManualClock

GOOD_CARD = "pm_card_visa"
BAD_CARD = "pm_card_chargeDeclined"
FEE_CENTS = 100
PRICE_CENTS = 2700
ENOUGH_TICKS = 2
"""In which everything that is due happens: what the first one decides, the second one carries out."""

Result = TypeVar("Result")

on_sqlite_only = pytest.mark.parametrize("ground", ["sqlite"], indirect=True)
"""For tests whose rule no database decides."""


@dataclass(frozen=True)
class Answer:
    """An answer in the envelope."""

    status: int
    body: Any
    headers: Mapping[str, str]

    @property
    def data(self) -> Any:
        assert self.status < 400, f"{self.status} {self.body}"
        assert set(self.body) == {"success", "data"}
        assert self.body["success"] is True
        return self.body["data"]

    @property
    def error(self) -> dict[str, Any]:
        assert self.status >= 400, f"{self.status} {self.body}"
        assert set(self.body) == {"success", "error"}
        assert self.body["success"] is False
        error: dict[str, Any] = self.body["error"]
        assert set(error) in ({"code", "message"}, {"code", "message", "details"})
        assert error["message"]
        return error

    @property
    def refusal(self) -> tuple[int, str]:
        return self.status, self.error["code"]


class MoodyGateway:
    """The embedded gateway behind a line that can break before or after it does what it is asked."""

    def __init__(self, ledger: LedgerGateway) -> None:
        self._ledger = ledger
        self.down = False
        """Nothing arrives."""
        self.mute = False
        """Everything takes effect, and no answer comes back."""
        self.charges: list[tuple[str, str, int]] = []
        """Key, card and cents of every charge that arrived."""

    async def attach(self, token: str) -> Card:
        self._arrive()
        card = await self._ledger.attach(token)
        self._answer()
        return card

    async def charge(self, idempotency_key: str, token: str, amount_cents: int, description: str) -> Outcome:
        self._arrive()
        self.charges.append((idempotency_key, token, amount_cents))
        outcome = await self._ledger.charge(idempotency_key, token, amount_cents, description)
        self._answer()
        return outcome

    async def refund(self, idempotency_key: str) -> None:
        self._arrive()
        await self._ledger.refund(idempotency_key)
        self._answer()

    def _arrive(self) -> None:
        if self.down:
            raise GatewayUnavailable("the line is dead")

    def _answer(self) -> None:
        if self.mute:
            raise GatewayUnavailable("the line broke before the answer")


@dataclass
class Customer:
    """An account and its calls."""

    market: Market
    id: str
    key: str

    async def put_card(self, card: str) -> Answer:
        return await self.call("POST", "/api/billing/payment-method", {"paymentMethod": card})

    async def subscribe(self, pool: str, *blocks: str, quantity: int = 1) -> Answer:
        body = {"blocks": list(blocks or ("night",)), "quantity": quantity}
        return await self.call("POST", f"/api/pools/{pool}/subscribe", body)

    async def my_pledge(self, pool: str) -> Answer:
        return await self.call("GET", f"/api/pools/{pool}/my-pledge")

    async def my_key(self, pool: str) -> Answer:
        return await self.call("GET", f"/api/pools/{pool}/my-key")

    async def withdraw(self, pool: str) -> Answer:
        return await self.call("DELETE", f"/api/pools/{pool}/pledge")

    async def cancel(self, pledge_id: str) -> Answer:
        return await self.call("POST", f"/api/billing/pledges/{pledge_id}/cancel")

    async def resume(self, pledge_id: str) -> Answer:
        return await self.call("POST", f"/api/billing/pledges/{pledge_id}/resume")

    async def portal(self) -> Answer:
        return await self.call("GET", "/api/billing/portal")

    async def call(self, method: str, path: str, body: Any = None) -> Answer:
        return await self.market.call(method, path, body, key=self.key)

    async def status(self, pool: str) -> str:
        """Of the pledge in this pool; `none` where there is none to see."""
        answer = await self.my_pledge(pool)
        return "none" if answer.status == 404 else str(answer.data["status"])


@dataclass
class Market:
    """A control plane with its application, its lifecycle and an operator."""

    context: ControlPlane
    clock: ManualClock
    client: httpx.AsyncClient
    lifecycle: Lifecycle
    operator_key: str
    accounts: int = field(default=0)

    @classmethod
    async def open(cls, context: ControlPlane, clock: ManualClock, *, show_errors: bool = True) -> Market:
        """A market with an operator. With `show_errors` an unexpected error is raised, else it is a 500."""
        app = _app()
        app.state.control_plane = context
        transport = httpx.ASGITransport(app, raise_app_exceptions=show_errors)
        client = httpx.AsyncClient(transport=transport, base_url=context.public_url)
        async with context.database.write() as session:
            operator_key = await new_operator_key(session, "ops@example.com", clock())
        return cls(context, clock, client, Lifecycle(context), operator_key)

    @property
    def database(self) -> Database:
        return self.context.database

    @property
    def gateway(self) -> MoodyGateway:
        assert isinstance(self.context.gateway, MoodyGateway)
        return self.context.gateway

    # --- calls -----------------------------------------------------------------------------------

    async def call(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        key: str | None = None,
        headers: Mapping[str, str] | None = None,
        content: bytes | None = None,
    ) -> Answer:
        sent = dict(headers or {})
        if key is not None:
            sent["authorization"] = f"Bearer {key}"
        response = await self.client.request(method, path, json=body, content=content, headers=sent)
        assert response.headers["content-type"] == "application/json", response.text
        return Answer(response.status_code, response.json(), response.headers)

    async def operate(self, method: str, path: str, body: Any = None) -> Answer:
        return await self.call(method, f"/api/admin{path}", body, key=self.operator_key)

    # --- what a market is made of ------------------------------------------------------------------

    async def customer(self, card: str | None = GOOD_CARD) -> Customer:
        """Somebody with this card on file; None for no card."""
        self.accounts += 1
        now = self.clock()
        async with self.database.write() as session:
            email = f"c{self.accounts}@example.com"
            account, key = await accounts.create(session, "Customer", email, Role.CUSTOMER, now)
            if card is not None:
                session.add(
                    PaymentMethod(
                        account_id=account.id, token=card, brand="visa", last4="4242", updated_at=now
                    )
                )
        return Customer(self, account.id, key)

    async def draft(self, **changes: Any) -> str:
        """The id of a new draft; see `terms`."""
        async with self.database.write() as session:
            offer = PoolTerms.model_validate(terms(**changes))
            return (await pools.create(session, offer, self.clock())).id

    async def pool(self, **changes: Any) -> str:
        """The id of a new pool that collects pledges."""
        async with self.database.write() as session:
            offer = PoolTerms.model_validate(terms(**changes))
            pool = await pools.create(session, offer, self.clock())
            await pools.open_for_pledges(session, pool)
            return pool.id

    async def live_pool(self, **changes: Any) -> str:
        """The id of a pool that is active, with a node and one seat of its night block taken."""
        pool_id = await self.pool(**{"min_seats": 1, **changes})
        await self.node(pool_id)
        first = await self.customer()
        _ = (await first.subscribe(pool_id)).data
        await self.settle(1)
        assert await first.status(pool_id) == "active"
        return pool_id

    async def node(self, pool_id: str, *, ready: bool = True, **told: Any) -> str:
        """The id of a node that has joined, and is ready if asked for. `told` changes what it can do;
        `capacity=None` is a node that has not measured it."""
        node_id = new_id()
        can = told["capacity"] if "capacity" in told else measured(**told)
        async with self.database.write() as session:
            session.add(
                Node(
                    id=node_id,
                    pool_id=pool_id,
                    name="gpu",
                    token_sha256=key_sha256(new_key(KeyKind.NODE)),
                    epoch=1,
                    boot_id="boot",
                    base_url=f"http://{node_id}:8001",
                    created_at=self.clock(),
                    capacity=can,
                )
            )
        if ready:
            await self.hear(node_id)
        return node_id

    async def hear(self, node_id: str, serving: ServingState = ServingState.READY) -> None:
        """The node's heartbeat: it serves its pool's model."""
        async with self.database.write() as session:
            model_id = await session.scalar(
                select(Pool.model_id).join(Node, Node.pool_id == Pool.id).where(Node.id == node_id)
            )
            said = {"heard_at": self.clock(), "serving": serving, "model_id": model_id}
            await session.execute(update(Node).where(Node.id == node_id).values(**said))

    async def hear_all(self) -> None:
        """Every node's heartbeat."""
        async with self.database.read() as session:
            node_ids = list(await session.scalars(select(Node.id)))
        for node_id in node_ids:
            await self.hear(node_id)

    # --- time --------------------------------------------------------------------------------------

    async def settle(self, ticks: int = ENOUGH_TICKS) -> None:
        """Let the lifecycle do what is due now."""
        for _ in range(ticks):
            await self.lifecycle.tick()

    async def wait(self, **span: float) -> None:
        """Time passes, and then the lifecycle does what is due."""
        self.clock.now += datetime.timedelta(**span)
        await self.settle()

    async def wait_until(self, moment: datetime.datetime) -> None:
        assert moment >= self.clock.now
        self.clock.now = moment
        await self.settle()

    # --- what can be seen --------------------------------------------------------------------------

    async def status(self, pool_id: str) -> str:
        return str((await self.operate("GET", f"/pools/{pool_id}")).data["status"])

    async def pledged_slots(self, pool_id: str) -> int:
        return int((await self.operate("GET", f"/pools/{pool_id}")).data["pledgedSlots"])

    async def revision(self, pool_id: str) -> int:
        return int((await self.operate("GET", f"/pools/{pool_id}")).data["revision"])

    async def taken(self) -> list[int]:
        """Cents of every charge that went through at the gateway and was not refunded, oldest first."""
        async with self.database.read() as session:
            rows = await session.scalars(
                select(LedgerEntry.amount_cents)
                .where(LedgerEntry.decline_code.is_(None), LedgerEntry.refunded.is_(False))
                .order_by(LedgerEntry.created_at, LedgerEntry.amount_cents)
            )
            return list(rows)

    async def rows(self, query: str, **values: Any) -> list[Any]:
        async with self.database.read() as session:
            return [tuple(row) for row in await session.execute(text(query), values)]


def terms(*, blocks: Mapping[str, tuple[int, object]] | None = None, **changes: Any) -> dict[str, Any]:
    """An operator's offer: 10 seats at 27.00 in each block, live from 2 seats on.

    `blocks` gives seats and monthly price by block; other changes are in snake_case.
    """
    offered = blocks or dict.fromkeys(("night", "europe", "americas"), (10, "27.00"))
    offer: dict[str, Any] = {
        "slug": f"pool-{new_id()}",
        "modelId": "org/model",
        "modelName": "Model",
        "description": "A model.",
        "infraSpec": "8x H100",
        "blocks": {name: {"seats": seats, "monthlyPrice": price} for name, (seats, price) in offered.items()},
        "minSeats": 2,
        "guaranteeTokS": 50.0,
        "rpmLimit": 60,
        "tpmLimit": 100_000,
        "engineArgs": ["--max-num-seqs", "64"],
        "declaredCapacity": capacity(),
    }
    for name, value in changes.items():
        head, *rest = name.split("_")
        offer[head + "".join(word.capitalize() for word in rest)] = value
    return offer


# --- fixtures for test modules to import ---------------------------------------------------------------


@functools.cache
def _database(url: str) -> Database:
    """Kept, with the statements that it compiled, which take longer than to run them."""
    database = Database(url)
    if database.is_sqlite:
        without_fsync(database)
    return database


_in_its_thread = aiosqlite.Connection._execute


async def _here(
    connection: aiosqlite.Connection, function: Callable[..., Any], *args: object, **kwargs: object
) -> Any:
    return function(*args, **kwargs)


@contextlib.contextmanager
def swift_sqlite(swift: bool = True) -> Iterator[None]:
    """Let SQLite's statements run where they are asked for, not in a thread of their connection, which takes
    much of a test's time. Then nothing happens at the same time: `at_once` takes it back."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aiosqlite.Connection, "_execute", _here if swift else _in_its_thread)
        yield


async def at_once(*calls: Awaitable[Result]) -> list[Result]:
    """All of them at the same time."""
    with swift_sqlite(False):
        return await asyncio.gather(*calls)


def without_fsync(database: Database) -> None:
    """What a test writes need not survive a power cut."""

    def relax(connection: Any, record: Any) -> None:
        connection.execute("PRAGMA synchronous = OFF")

    for engine in (database._writer, database._reader):
        event.listen(engine.sync_engine, "connect", relax)


@functools.cache
def _app() -> FastAPI:
    """Making one takes longer than most tests; which control plane it serves is in its state."""
    nobody: Any = None
    return create_app(nobody)


@pytest.fixture(name="ground", params=["sqlite", "postgresql"])
async def empty_ground(request: pytest.FixtureRequest) -> AsyncIterator[Database]:
    """A migrated database with nothing in it, of each kind in turn; the same one for every test."""
    if request.param == "sqlite":
        template: Path = request.getfixturevalue("sqlite_template")
        path = template.with_name("market.db")
        for file in path.parent.glob(f"{path.name}*"):
            file.unlink()
        shutil.copy(template, path)
        database = _database(f"sqlite:///{path}")
    else:
        url = request.getfixturevalue("postgres_template")
        database = _database(url.replace("/postgres?", "/market?"))
        if url in _created:
            await _empty(database)
        else:
            await _create(url)
            _created.add(url)
    with swift_sqlite():
        yield database
        await database.close()


_created: set[str] = set()
"""PostgreSQL servers that have the database."""


async def _empty(database: Database) -> None:
    tables = [table.name for table in reversed(metadata.sorted_tables) if table.name != "store"]
    deletions = "".join(f"DELETE FROM {name};" for name in tables)  # noqa: S608
    async with database.engine.begin() as connection:
        await connection.execute(text(f"DO $$ BEGIN {deletions} END $$"))


async def _create(server_url: str) -> None:
    engine = create_async_engine(async_url(server_url), isolation_level="AUTOCOMMIT")
    async with engine.connect() as connection:
        await connection.execute(text(f"CREATE DATABASE market TEMPLATE {TEMPLATE}"))
    await engine.dispose()


@pytest.fixture(name="market")
async def open_market(ground: Database, clock: ManualClock) -> AsyncIterator[Market]:
    """A market on each kind of database, whose gateway can be told to fail."""
    gateway = MoodyGateway(LedgerGateway(ground, clock))
    context = ControlPlane(ground, clock, gateway, Vault(bytes(32)), "http://control-plane.test")
    market = await Market.open(context, clock)
    async with market.client:
        yield market
