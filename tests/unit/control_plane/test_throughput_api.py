"""Throughput over HTTP: what a customer and an operator see."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from control_plane.accounts.tables import Account, Role
from control_plane.context import ControlPlane
from control_plane.database import Database
from control_plane.pledges.tables import Pledge, PledgeState
from control_plane.pools.tables import Pool, PoolState
from control_plane.throughput import admin_routes, routes
from control_plane.throughput.tables import ThroughputMinute
from tests.unit.control_plane.conftest import (
    NOON,
    ManualClock,
    add_account,
    add_node,
    add_pledge,
    add_pool,
    app_of,
    client_of,
)

MINUTE = datetime.timedelta(minutes=1)
NOTHING_MORE: dict[str, Any] = {
    "borrowedTokens": 0.0,
    "heldS": 0.0,
    "owedSeconds": 0,
    "missedSeconds": 0,
    "attainment1s": None,
    "attainment10s": None,
    "attainment60s": None,
}
"""Of the ledger: nothing borrowed or held, and no window in which anything was owed."""


@dataclass
class Stage:
    """A customer with an active pledge of 2 seats in two blocks."""

    app: FastAPI
    database: Database
    pool: Pool
    account: Account
    key: str
    pledge: Pledge

    async def add(
        self,
        minute: datetime.datetime,
        owed: float,
        delivered: int,
        pledge: Pledge | None = None,
        **ledger: float,
    ) -> None:
        async with self.database.write() as session:
            session.add(
                ThroughputMinute(
                    pledge_id=(pledge or self.pledge).id,
                    minute=minute,
                    requests=1,
                    input_tokens=5,
                    output_tokens=delivered,
                    owed_tokens=owed,
                    shortfall_tokens=max(0.0, owed - delivered),
                    **ledger,
                )
            )

    async def mine(self, query: str = "") -> dict[str, Any]:
        async with client_of(self.app, self.key) as customer:
            answer = await customer.get(f"/api/pools/{self.pool.slug}/my-throughput{query}")
        assert answer.status_code == 200, answer.text
        data: dict[str, Any] = answer.json()["data"]
        return data

    async def operators(self, query: str = "") -> httpx.Response:
        _, key = await add_account(self.database, Role.OPERATOR)
        async with client_of(self.app, key) as operator:
            return await operator.get(f"/api/admin/pools/{self.pool.id}/throughput{query}")


@pytest.fixture
async def stage(control_plane: ControlPlane, database: Database) -> Stage:
    pool = await add_pool(database)
    account, key = await add_account(database)
    node, _ = await add_node(database, pool)
    pledge = await add_pledge(database, pool, node, account, quantity=2, blocks=["night", "europe"])
    return Stage(
        app_of(control_plane, routes.router, admin_routes.router), database, pool, account, key, pledge
    )


# --- the customer's ------------------------------------------------------------------------------


async def test_a_customer_sees_owed_delivered_and_attainment_by_minute(stage: Stage) -> None:
    await stage.add(NOON, 0.0, 30)
    await stage.add(NOON - MINUTE, 100.0, 250)
    await stage.add(NOON - 2 * MINUTE, 100.1234567, 50)
    found = await stage.mine()
    counts = {"inputTokens": 5, "requests": 1, **NOTHING_MORE}
    assert found == {
        "poolId": stage.pool.id,
        "pledgeId": stage.pledge.id,
        "guaranteeTokS": 10.0,
        "quantity": 2,
        "minutes": [
            {
                "minute": "2026-03-10T11:58:00.000Z",
                "owedTokens": 100.123,
                "deliveredTokens": 50,
                "attainment": pytest.approx(50 / 100.1234567),
                **counts,
            },
            {
                "minute": "2026-03-10T11:59:00.000Z",
                "owedTokens": 100.0,
                "deliveredTokens": 250,
                "attainment": 1.0,
                **counts,
            },
            {
                "minute": "2026-03-10T12:00:00.000Z",
                "owedTokens": 0.0,
                "deliveredTokens": 30,
                "attainment": None,
                **counts,
            },
        ],
        "totals": {
            "owedTokens": 200.123,
            "deliveredTokens": 330,
            "attainment": pytest.approx(150 / 200.1234567),
            "inputTokens": 15,
            "requests": 3,
            **NOTHING_MORE,
        },
    }


async def test_a_quiet_pledge_has_no_minutes_and_no_attainment(stage: Stage) -> None:
    found = await stage.mine()
    assert found["minutes"] == []
    assert found["totals"] == {
        "owedTokens": 0.0,
        "deliveredTokens": 0,
        "attainment": None,
        "inputTokens": 0,
        "requests": 0,
        **NOTHING_MORE,
    }


async def test_a_customer_sees_what_was_borrowed_and_held_and_the_worst_windows(stage: Stage) -> None:
    await stage.add(NOON - MINUTE, 60.0, 100, borrowed_tokens=40.0, held_s=1.5, attainment_1s=0.5)
    await stage.add(NOON, 60.0, 59, held_s=0.25, attainment_1s=0.9, attainment_10s=1.0, attainment_60s=0.98)
    found = await stage.mine()
    names = ("borrowedTokens", "heldS", "attainment1s", "attainment10s", "attainment60s")
    assert [[minute[name] for name in names] for minute in found["minutes"]] == [
        [40.0, 1.5, 0.5, None, None],
        [0.0, 0.25, 0.9, 1.0, 0.98],
    ]
    assert [found["totals"][name] for name in names] == [40.0, 1.75, 0.5, 1.0, 0.98]
    operators = (await stage.operators()).json()["data"]
    assert [operators["totals"][name] for name in names] == [40.0, 1.75, 0.5, 1.0, 0.98]
    assert [operators["pledges"][0][name] for name in names] == [40.0, 1.75, 0.5, 1.0, 0.98]


async def test_everybody_sees_how_many_seconds_were_owed_and_missed(stage: Stage) -> None:
    await stage.add(NOON - MINUTE, 60.0, 100, owed_seconds=58, missed_seconds=3)
    await stage.add(NOON, 60.0, 59, owed_seconds=40)
    mine, operators = await stage.mine(), (await stage.operators()).json()["data"]
    for found in (mine, operators):
        seconds = [
            (part["owedSeconds"], part["missedSeconds"]) for part in (*found["minutes"], found["totals"])
        ]
        assert seconds == [(58, 3), (40, 0), (98, 3)]
    assert (operators["pledges"][0]["owedSeconds"], operators["pledges"][0]["missedSeconds"]) == (98, 3)


async def test_the_window_is_so_many_minutes_with_the_running_one(stage: Stage, clock: ManualClock) -> None:
    for back in range(4):
        await stage.add(NOON - back * MINUTE, 1.0, 1)
    clock.advance(59)
    found = await stage.mine("?minutes=2")
    assert [minute["minute"] for minute in found["minutes"]] == [
        "2026-03-10T11:59:00.000Z",
        "2026-03-10T12:00:00.000Z",
    ]
    assert len((await stage.mine("?minutes=1"))["minutes"]) == 1


async def test_minutes_are_1_to_1440(stage: Stage) -> None:
    async with client_of(stage.app, stage.key) as customer:
        for minutes in ("0", "1441", "-1", "x", "", "1.5", "9" * 30):
            answer = await customer.get(f"/api/pools/{stage.pool.id}/my-throughput?minutes={minutes}")
            assert (answer.status_code, answer.json()["error"]["code"]) == (422, "invalid_request")
        assert (await customer.get("/api/pools/%00/my-throughput")).status_code == 422
    assert (await stage.operators("?minutes=1441")).status_code == 422
    await stage.mine("?minutes=1440")


@pytest.mark.parametrize("state", [PledgeState.HELD, PledgeState.CANCELED])
async def test_a_pledge_that_is_not_shown_is_404(stage: Stage, state: PledgeState) -> None:
    account, key = await add_account(stage.database)
    await add_pledge(stage.database, stage.pool, account=account, state=state)
    async with client_of(stage.app, key) as customer:
        answer = await customer.get(f"/api/pools/{stage.pool.id}/my-throughput")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "pledge_not_found")


async def test_nobody_sees_anothers_pledge_or_a_draft(stage: Stage) -> None:
    draft = await add_pool(stage.database, PoolState.DRAFT)
    _, key = await add_account(stage.database)
    async with client_of(stage.app, key) as customer:
        answer = await customer.get(f"/api/pools/{stage.pool.id}/my-throughput")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "pledge_not_found")
        answer = await customer.get(f"/api/pools/{draft.id}/my-throughput")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "pool_not_found")
    async with client_of(stage.app) as stranger:
        assert (await stranger.get(f"/api/pools/{stage.pool.id}/my-throughput")).status_code == 401


# --- the operator's ------------------------------------------------------------------------------


async def test_an_operator_sees_the_pool_by_minute_and_each_pledge(stage: Stage) -> None:
    other = await add_pledge(stage.database, stage.pool, created_at=NOON + MINUTE)
    gone = await add_pledge(
        stage.database, stage.pool, state=PledgeState.CANCELED, created_at=NOON + 2 * MINUTE
    )
    idle = await add_pledge(stage.database, stage.pool, created_at=NOON + 3 * MINUTE)
    await add_pledge(stage.database, stage.pool, state=PledgeState.CANCELED)
    elsewhere = await add_pledge(stage.database, await add_pool(stage.database))
    await stage.add(NOON - MINUTE, 100.0, 50)
    await stage.add(NOON, 100.0, 500)
    await stage.add(NOON, 100.0, 0, other)
    await stage.add(NOON, 0.0, 7, gone)
    await stage.add(NOON, 9.0, 9, elsewhere)
    await stage.add(NOON - 60 * MINUTE, 9.0, 9, other)

    found = (await stage.operators()).json()["data"]

    by_minute = [
        (minute["minute"][11:16], minute["owedTokens"], minute["deliveredTokens"], minute["attainment"])
        for minute in found["minutes"]
    ]
    assert by_minute == [("11:59", 100.0, 50, 0.5), ("12:00", 200.0, 507, 0.5)]
    assert found["totals"] == {
        "owedTokens": 300.0,
        "deliveredTokens": 557,
        "attainment": 0.5,
        "inputTokens": 20,
        "requests": 4,
        **NOTHING_MORE,
    }
    assert [pledge["pledgeId"] for pledge in found["pledges"]] == [
        stage.pledge.id,
        other.id,
        gone.id,
        idle.id,
    ]
    assert found["pledges"][0] == {
        "pledgeId": stage.pledge.id,
        "accountId": stage.account.id,
        "nodeId": stage.pledge.node_id,
        "status": "active",
        "quantity": 2,
        "seats": 4,
        "owedTokens": 200.0,
        "deliveredTokens": 550,
        "attainment": 0.75,
        "shortfallTokens": 50.0,
        "inputTokens": 10,
        "requests": 2,
        **NOTHING_MORE,
    }
    assert [pledge["attainment"] for pledge in found["pledges"]] == [0.75, 0.0, None, None]


async def test_a_pool_that_never_served_has_nothing_to_show(stage: Stage) -> None:
    found = (await stage.operators()).json()["data"]
    assert found["minutes"] == [] and found["totals"]["attainment"] is None


async def test_only_operators_see_a_pools_throughput(stage: Stage) -> None:
    async with client_of(stage.app, stage.key) as customer:
        answer = await customer.get(f"/api/admin/pools/{stage.pool.id}/throughput")
    assert answer.status_code == 403
