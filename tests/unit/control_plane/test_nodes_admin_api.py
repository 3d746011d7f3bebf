"""The operator's side of nodes over HTTP: join tokens, the list, draining."""

from __future__ import annotations

from dataclasses import dataclass

import httpx
import pytest
from fastapi import FastAPI

from contract.keys import KeyKind, is_key
from contract.nodes import ServingState
from control_plane.accounts.tables import Role
from control_plane.context import ControlPlane
from control_plane.database import Database, new_id
from control_plane.nodes import admin_routes, routes
from control_plane.nodes.tables import Node
from control_plane.pledges.tables import PledgeState
from control_plane.pools.tables import Pool, PoolState
from tests.unit.control_plane.conftest import (
    ManualClock,
    add_account,
    add_node,
    add_pledge,
    add_pool,
    app_of,
    client_of,
)

PATHS = [
    ("POST", "/api/admin/pools/p/join-tokens"),
    ("GET", "/api/admin/nodes"),
    ("POST", "/api/admin/nodes/n/drain"),
    ("POST", "/api/admin/nodes/n/undrain"),
]


@dataclass
class Stage:
    app: FastAPI
    database: Database
    pool: Pool
    node: Node
    key: str

    def operator(self) -> httpx.AsyncClient:
        return client_of(self.app, self.key)

    async def revision(self) -> int:
        async with self.database.read() as session:
            return (await session.get_one(Pool, self.pool.id)).revision


@pytest.fixture
async def stage(control_plane: ControlPlane, database: Database) -> Stage:
    pool = await add_pool(database)
    node, _ = await add_node(database, pool)
    _, key = await add_account(database, Role.OPERATOR)
    return Stage(app_of(control_plane, admin_routes.router, routes.router), database, pool, node, key)


async def test_only_operators_get_in(stage: Stage) -> None:
    _, customer = await add_account(stage.database)
    for key, status in ((None, 401), (customer, 403)):
        async with client_of(stage.app, key) as caller:
            for method, path in PATHS:
                assert (await caller.request(method, path)).status_code == status


async def test_a_join_token_is_for_one_pool_a_draft_too_and_a_day(stage: Stage) -> None:
    draft = await add_pool(stage.database, PoolState.DRAFT)
    async with stage.operator() as operator:
        answer = await operator.post(f"/api/admin/pools/{draft.slug}/join-tokens")
        token = answer.json()["data"]["joinToken"]
        assert answer.json()["data"] == {
            "joinToken": token,
            "expiresAt": "2026-03-11T12:00:00.000Z",
            "poolSlug": draft.slug,
        }
        assert is_key(token, KeyKind.JOIN)
        enrolled = await operator.post("/internal/enrol", json={"join_token": token, "name": "n"})
    assert enrolled.json()["data"]["pool_slug"] == draft.slug


async def test_what_is_not_there_is_404_and_what_cannot_be_is_422(stage: Stage) -> None:
    nul = "%00"
    async with stage.operator() as operator:
        for status, code, name in ((404, "not_found", new_id()), (422, "invalid_request", nul)):
            for method, path in [
                ("POST", f"/api/admin/pools/{name}/join-tokens"),
                ("GET", f"/api/admin/nodes?pool={name}"),
                ("POST", f"/api/admin/nodes/{name}/drain"),
                ("POST", f"/api/admin/nodes/{name}/undrain"),
            ]:
                answer = await operator.request(method, path)
                assert answer.status_code == status, answer.text
                assert answer.json()["error"]["code"].endswith(code)


async def test_the_list_shows_what_a_node_is_and_how_it_lags(stage: Stage, clock: ManualClock) -> None:
    await add_pledge(stage.database, stage.pool, stage.node, quantity=2, blocks=["night", "europe"])
    await add_pledge(stage.database, stage.pool, stage.node, state=PledgeState.PAST_DUE)
    await add_pledge(stage.database, stage.pool, stage.node, state=PledgeState.CANCELED)
    clock.advance(30)
    async with stage.operator() as operator:
        [shown] = (await operator.get("/api/admin/nodes")).json()["data"]
    assert shown == {
        "id": stage.node.id,
        "name": "gpu-1",
        "poolId": stage.pool.id,
        "poolSlug": stage.pool.slug,
        "baseUrl": "http://gpu-1:8000",
        "state": "ready",
        "ready": True,
        "lastHeartbeatAt": "2026-03-10T12:00:00.000Z",
        "revision": 0,
        "poolRevision": 1,
        "restarts": 0,
        "spooledReports": 0,
        "clockOffsetMs": None,
        "gpus": [],
        "problem": None,
        "pledges": 2,
        "seats": 5,
        "guaranteeTokS": 10.0,
        "capacity": None,
        "capacityAt": None,
        "mostSeats": None,
        "busiestBlockSeats": 3,
        "attainment60s": None,
    }


async def test_the_list_shows_the_gpus_of_the_last_heartbeat(stage: Stage) -> None:
    gpu = {
        "name": "H100",
        "memory_used_bytes": 1,
        "memory_total_bytes": 2,
        "utilization_percent": 3,
        "power_watts": 4.5,
        "temperature_celsius": 5,
    }
    await add_node(
        stage.database, await add_pool(stage.database), gpus=[gpu], serving=ServingState.FAILED, problem="hot"
    )
    async with stage.operator() as operator:
        shown = (await operator.get("/api/admin/nodes")).json()["data"]
    [failed] = [node for node in shown if node["id"] != stage.node.id]
    assert (failed["state"], failed["ready"], failed["problem"]) == ("failed", False, "hot")
    assert failed["gpus"] == [
        {
            "name": "H100",
            "memoryUsedBytes": 1,
            "memoryTotalBytes": 2,
            "utilizationPercent": 3,
            "powerWatts": 4.5,
            "temperatureCelsius": 5,
        }
    ]


async def test_the_list_can_be_of_one_pool(stage: Stage) -> None:
    await add_node(stage.database, await add_pool(stage.database))
    async with stage.operator() as operator:
        for name in (stage.pool.id, stage.pool.slug):
            shown = (await operator.get("/api/admin/nodes", params={"pool": name})).json()["data"]
            assert [node["id"] for node in shown] == [stage.node.id]


async def test_draining_changes_the_orders_once_however_often_it_is_said(stage: Stage) -> None:
    async with stage.operator() as operator:
        for action, state, revision in [
            ("drain", "draining", 2),
            ("drain", "draining", 2),
            ("undrain", "ready", 3),
            ("undrain", "ready", 3),
        ]:
            answer = await operator.post(f"/api/admin/nodes/{stage.node.id}/{action}")
            assert answer.status_code == 200
            shown = answer.json()["data"]
            assert (shown["state"], shown["ready"]) == (state, state == "ready")
            assert shown["poolRevision"] == await stage.revision() == revision
