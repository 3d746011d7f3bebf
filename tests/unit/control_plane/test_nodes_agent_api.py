"""The agent API over HTTP: joining, epochs, heartbeats, orders by long poll, reports."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import json
import logging
import socket
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from sqlalchemy import func, select, update

from contract.capacity import NodeCapacity
from contract.keys import KeyKind, key_sha256, new_key
from contract.nodes import (
    Acknowledged,
    Answer,
    Enrolled,
    GpuFigures,
    Orders,
    Registered,
    ReportsStored,
    ServingState,
)
from control_plane.body_limit import MAX_INTERNAL_BODY_BYTES
from control_plane.context import ControlPlane
from control_plane.database import Database
from control_plane.nodes import routes, service
from control_plane.nodes.tables import JoinToken, Node
from control_plane.pools import service as pools
from control_plane.pools.tables import Pool
from tests.contract.documents import measured
from tests.unit.control_plane.conftest import (
    NOON,
    ManualClock,
    add_node,
    add_pledge,
    add_pool,
    app_of,
    client_of,
)

pytestmark = pytest.mark.slow

AT = "2026-03-10T12:00:00Z"
PROMPT_S = 1.5
"""Well below any wait that a test asks for."""


def beat(**changes: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "epoch": 1,
        "serving": "ready",
        "model_id": "org/model",
        "revision": 4,
        "restarts": 2,
        "spooled_reports": 7,
        "clock_offset_ms": -1.5,
        "gpus": [],
        "problem": None,
    }
    return fields | changes


def report(pledge_id: str = "p", **changes: Any) -> dict[str, Any]:
    counters = ("dispatched", "rejected", "evicted", "canceled", "input_tokens", "cached_tokens")
    seat: dict[str, Any] = dict.fromkeys((*counters, "output_tokens", "queued", "in_flight"), 1)
    seat |= {"pledge_id": pledge_id, "owed_tokens": 1.0, "shortfall_tokens": 0.0, "attainment_60s": None}
    fields: dict[str, Any] = {
        "version": 1,
        "boot_id": "serving-1",
        "sequence": 1,
        "at": AT,
        "entitlements_revision": 1,
        "seats": [seat | changes.pop("seat", {})],
    }
    return fields | changes


@dataclass
class Stage:
    """A pool with one node, and the application that its agent talks to."""

    app: FastAPI
    database: Database
    pool: Pool
    node: Node
    token: str

    def agent(self) -> httpx.AsyncClient:
        return client_of(self.app, self.token)

    async def touch(self) -> None:
        async with self.database.write() as session:
            pools.touch(await pools.lock(session, self.pool.id))

    async def stored(self) -> Node:
        async with self.database.read() as session:
            return await session.get_one(Node, self.node.id)

    async def join_token(self) -> str:
        async with self.database.write() as session:
            token, _ = await service.new_join_token(session, self.pool, NOON)
        return token


@pytest.fixture
async def stage(control_plane: ControlPlane, database: Database) -> Stage:
    pool = await add_pool(database)
    node, token = await add_node(database, pool)
    return Stage(app_of(control_plane, routes.router), database, pool, node, token)


def refused(answer: httpx.Response, status: int, code: str) -> str:
    """The message of a refusal with this status and code."""
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert body["success"] is False
    assert body["error"]["code"] == code
    return str(body["error"]["message"])


# --- joining -------------------------------------------------------------------------------------


async def test_a_join_token_makes_a_node_whose_token_opens_the_agent_api(stage: Stage) -> None:
    body = {"join_token": await stage.join_token(), "name": "gpu-2"}
    async with client_of(stage.app) as stranger:
        answer = await stranger.post("/internal/enrol", json=body)
    enrolled = Answer[Enrolled].parse(answer.content, "answer").data
    assert enrolled.pool_slug == stage.pool.slug
    async with client_of(stage.app, enrolled.node_token) as agent:
        registration = {"boot_id": "b", "base_url": "http://gpu-2:8000"}
        assert (await agent.post("/internal/register", json=registration)).status_code == 200
    async with stage.database.read() as session:
        node = await session.get_one(Node, enrolled.node_id)
    assert (node.name, node.pool_id, node.base_url) == ("gpu-2", stage.pool.id, "http://gpu-2:8000")


async def test_only_hashes_of_tokens_are_stored(stage: Stage) -> None:
    join_token = await stage.join_token()
    async with client_of(stage.app) as stranger:
        answer = await stranger.post("/internal/enrol", json={"join_token": join_token, "name": "n"})
    node_token = answer.json()["data"]["node_token"]
    async with stage.database.read() as session:
        [row] = list(await session.scalars(select(JoinToken)))
        node = await session.get_one(Node, answer.json()["data"]["node_id"])
    assert row.token_sha256 == key_sha256(join_token)
    assert node.token_sha256 == key_sha256(node_token)


async def test_a_join_token_lets_one_node_join_even_of_many_at_once(stage: Stage) -> None:
    body = {"join_token": await stage.join_token(), "name": "n"}
    async with client_of(stage.app) as stranger:
        answers = await asyncio.gather(*(stranger.post("/internal/enrol", json=body) for _ in range(5)))
    assert sorted(answer.status_code for answer in answers) == [200, 401, 401, 401, 401]
    async with stage.database.read() as session:
        assert await session.scalar(select(func.count()).select_from(Node)) == 2


async def test_a_join_token_lasts_24_hours(stage: Stage, clock: ManualClock) -> None:
    bodies = [{"join_token": await stage.join_token(), "name": "n"} for _ in range(2)]
    async with client_of(stage.app) as stranger:
        clock.advance(24 * 3600 - 1)
        assert (await stranger.post("/internal/enrol", json=bodies[0])).status_code == 200
        clock.advance(1)
        answer = await stranger.post("/internal/enrol", json=bodies[1])
    message = refused(answer, 401, "invalid_join_token")
    assert "expired" in message and "join-tokens" in message


async def test_a_join_token_that_opens_nothing_is_refused_with_what_to_do(stage: Stage) -> None:
    async with client_of(stage.app) as stranger:
        for token, said in [
            ("", "mistyped"),
            ("join_é\u2028" + "x" * 60, "mistyped"),
            (new_key(KeyKind.NODE), "mistyped"),
            (new_key(KeyKind.JOIN)[:-1] + "!", "mistyped"),
            (new_key(KeyKind.JOIN), "unknown"),
        ]:
            answer = await stranger.post("/internal/enrol", json={"join_token": token, "name": "n"})
            message = refused(answer, 401, "invalid_join_token")
            assert said in message and "/api/admin/pools/<pool>/join-tokens" in message


async def test_a_used_join_token_says_so(stage: Stage) -> None:
    body = {"join_token": await stage.join_token(), "name": "n"}
    async with client_of(stage.app) as stranger:
        await stranger.post("/internal/enrol", json=body)
        answer = await stranger.post("/internal/enrol", json=body)
    assert "used already" in refused(answer, 401, "invalid_join_token")


async def test_calls_of_nodes_need_a_node_token(stage: Stage) -> None:
    for key in (None, new_key(KeyKind.NODE), new_key(KeyKind.MANAGEMENT)):
        async with client_of(stage.app, key) as stranger:
            for path in ("register", "heartbeat", "reports"):
                refused(await stranger.post(f"/internal/{path}"), 401, "unauthorized")
            refused(await stranger.get("/internal/orders?epoch=1"), 401, "unauthorized")


# --- epochs --------------------------------------------------------------------------------------


async def test_each_boot_gets_a_new_epoch_and_the_same_boot_the_same(stage: Stage) -> None:
    async with stage.agent() as agent:
        epochs = []
        for boot in ("a", "a", "b", "b", "a"):
            body = {"boot_id": boot, "base_url": f"http://gpu-{boot}"}
            answer = await agent.post("/internal/register", json=body)
            epochs.append(Answer[Registered].parse(answer.content, "answer").data.epoch)
    assert epochs == [2, 2, 3, 3, 4]
    assert (await stage.stored()).base_url == "http://gpu-a"


async def test_registering_again_with_the_same_boot_takes_its_new_address(stage: Stage) -> None:
    async with stage.agent() as agent:
        await agent.post("/internal/register", json={"boot_id": "boot", "base_url": "https://moved"})
    node = await stage.stored()
    assert (node.epoch, node.base_url) == (1, "https://moved")


@pytest.mark.parametrize(
    ("epoch", "code", "said"),
    [
        (1, "stale_epoch", "has been replaced"),
        (3, "unknown_epoch", "has not given out epoch 3"),
    ],
)
async def test_an_epoch_that_is_not_the_nodes_is_refused(
    stage: Stage, epoch: int, code: str, said: str
) -> None:
    async with stage.agent() as agent:
        await agent.post("/internal/register", json={"boot_id": "later", "base_url": "http://g"})
        answers = [
            await agent.post("/internal/heartbeat", json=beat(epoch=epoch, restarts=99)),
            await agent.post("/internal/reports", json={"epoch": epoch, "reports": [report()]}),
            await agent.get("/internal/orders", params={"epoch": epoch}),
        ]
    for answer in answers:
        assert said in refused(answer, 409, code)
    assert (await stage.stored()).restarts == 0


async def test_a_waiting_agent_that_is_replaced_is_told_at_once(stage: Stage) -> None:
    known = await follow(stage)
    async with stage.agent() as agent:
        waiting = asyncio.create_task(agent.get("/internal/orders", params=known | {"wait_s": 30}))
        await asyncio.sleep(0.05)
        await agent.post("/internal/register", json={"boot_id": "later", "base_url": "http://g"})
        answer = await asyncio.wait_for(waiting, PROMPT_S)
    refused(answer, 409, "stale_epoch")


# --- heartbeats ----------------------------------------------------------------------------------


async def test_a_heartbeat_is_stored_under_the_control_planes_clock(stage: Stage, clock: ManualClock) -> None:
    gpu = {
        "name": "H100",
        "memory_used_bytes": 80 * 2**30,
        "memory_total_bytes": 85 * 2**30,
        "utilization_percent": 99,
        "power_watts": 650.5,
        "temperature_celsius": 70,
    }
    clock.advance(100)
    async with stage.agent() as agent:
        answer = await agent.post(
            "/internal/heartbeat", json=beat(serving="failed", gpus=[gpu], problem="out of memory")
        )
    assert Answer[Acknowledged].parse(answer.content, "answer").data.at == clock.now
    node = await stage.stored()
    assert node.heard_at == clock.now
    assert node.serving is ServingState.FAILED
    assert (node.model_id, node.revision, node.restarts) == ("org/model", 4, 2)
    assert (node.spooled_reports, node.clock_offset_ms, node.problem) == (7, -1.5, "out of memory")
    assert node.gpus == [gpu]
    assert node.capacity is None


async def test_the_last_capacity_told_is_kept(stage: Stage, clock: ManualClock) -> None:
    async with stage.agent() as agent:
        for told in (measured(), measured(slots=8), None):
            clock.advance(10)
            assert (await agent.post("/internal/heartbeat", json=beat(capacity=told))).status_code == 200
        bad = await agent.post("/internal/heartbeat", json=beat(capacity=measured(slots=0)))
    refused(bad, 422, "invalid_request")
    node = await stage.stored()
    assert node.capacity is not None
    assert NodeCapacity.model_validate(node.capacity) == NodeCapacity.model_validate(measured(slots=8))
    assert node.capacity_at == clock.now - datetime.timedelta(seconds=10)


# --- orders --------------------------------------------------------------------------------------


async def follow(stage: Stage) -> dict[str, Any]:
    """Fetch the orders; what to ask with from then on."""
    async with stage.agent() as agent:
        answer = await agent.get("/internal/orders", params={"epoch": 1})
    entitlements = Answer[Orders].parse(answer.content, "answer").data.entitlements
    return {"epoch": 1, "store_id": entitlements.store_id, "revision": entitlements.revision}


async def test_a_node_without_orders_gets_them_at_once(stage: Stage) -> None:
    pledge = await add_pledge(stage.database, stage.pool, stage.node)
    async with stage.agent() as agent:
        answer = await agent.get("/internal/orders?epoch=1&store_id=&revision=0&wait_s=30")
    found = Answer[Orders].parse(answer.content, "answer").data
    assert [entry.pledge_id for entry in found.entitlements.pledges] == [pledge.id]
    assert found.entitlements.revision == 1


async def test_a_node_that_knows_the_latest_orders_gets_204_after_its_wait(stage: Stage) -> None:
    known = await follow(stage)
    async with stage.agent() as agent:
        started = time.monotonic()
        answer = await agent.get("/internal/orders", params=known | {"wait_s": 0.4})
        took_s = time.monotonic() - started
        assert (answer.status_code, answer.content) == (204, b"")
        assert 0.4 <= took_s < PROMPT_S
        assert (await agent.get("/internal/orders", params=known)).status_code == 204


async def test_a_change_ends_the_wait(stage: Stage) -> None:
    known = await follow(stage)
    async with stage.agent() as agent:
        waiting = asyncio.create_task(agent.get("/internal/orders", params=known | {"wait_s": 30}))
        await asyncio.sleep(0.05)
        await stage.touch()
        answer = await asyncio.wait_for(waiting, PROMPT_S)
    assert Answer[Orders].parse(answer.content, "answer").data.entitlements.revision == 2


async def test_a_change_by_another_control_plane_process_ends_the_wait(
    stage: Stage, database_url: str
) -> None:
    known = await follow(stage)
    elsewhere = Database(database_url)
    async with stage.agent() as agent:
        waiting = asyncio.create_task(agent.get("/internal/orders", params=known | {"wait_s": 30}))
        await asyncio.sleep(0.05)
        async with elsewhere.write() as session:
            pools.touch(await pools.lock(session, stage.pool.id))
        answer = await asyncio.wait_for(waiting, PROMPT_S)
    await elsewhere.close()
    assert answer.status_code == 200


async def test_orders_of_another_store_are_replaced_at_once_whatever_their_revision(stage: Stage) -> None:
    params: dict[str, Any] = {"epoch": 1, "store_id": "an older database", "revision": 1_000, "wait_s": 30}
    async with stage.agent() as agent:
        answer = await asyncio.wait_for(agent.get("/internal/orders", params=params), PROMPT_S)
    assert answer.json()["data"]["entitlements"]["revision"] == 1


async def test_a_node_ahead_of_its_own_store_waits_and_the_log_says_so_once(
    stage: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    known = await follow(stage)
    params = known | {"revision": 9, "wait_s": 0.6}
    with caplog.at_level(logging.WARNING, logger=routes.__name__):
        async with stage.agent() as agent:
            started = time.monotonic()
            answer = await agent.get("/internal/orders", params=params)
    assert answer.status_code == 204
    assert time.monotonic() - started >= 0.6
    [record] = caplog.records
    assert "revision 9" in record.getMessage() and "only at 1" in record.getMessage()


async def test_no_wait_is_longer_than_the_contracts(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "MAX_WAIT_S", 0.3)
    known = await follow(stage)
    async with stage.agent() as agent:
        call = agent.get("/internal/orders", params=known | {"wait_s": 1e300})
        assert (await asyncio.wait_for(call, PROMPT_S)).status_code == 204


async def test_a_stopping_server_ends_the_wait(stage: Stage) -> None:
    known = await follow(stage)
    async with stage.agent() as agent:
        waiting = asyncio.create_task(agent.get("/internal/orders", params=known | {"wait_s": 30}))
        await asyncio.sleep(0.05)
        stage.app.state.stopping.set()
        assert (await asyncio.wait_for(waiting, 0.2)).status_code == 204


@contextlib.asynccontextmanager
async def served(app: Any) -> AsyncIterator[int]:
    """The application behind a real server; its port."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off"))
    running = asyncio.create_task(server.serve([listener]))
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        await running


async def test_a_wait_ends_when_its_caller_has_gone(stage: Stage) -> None:
    known = await follow(stage)
    waiting = asyncio.Event()
    ended = asyncio.Event()

    async def watched(scope: Any, receive: Any, send: Any) -> None:
        waiting.set()
        await stage.app(scope, receive, send)
        ended.set()

    query = f"epoch=1&store_id={known['store_id']}&revision={known['revision']}&wait_s=30"
    head = f"GET /internal/orders?{query} HTTP/1.1\r\nhost: c\r\nauthorization: Bearer {stage.token}\r\n\r\n"
    async with served(watched) as port:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head.encode())
        await asyncio.wait_for(waiting.wait(), PROMPT_S)
        await asyncio.sleep(0.3)
        assert not ended.is_set()
        writer.close()
        await asyncio.wait_for(ended.wait(), PROMPT_S)


# --- reports -------------------------------------------------------------------------------------


async def test_a_batch_sent_again_is_all_duplicates(stage: Stage) -> None:
    body = {"epoch": 1, "reports": [report(sequence=1), report(sequence=2)]}
    async with stage.agent() as agent:
        answers = [await agent.post("/internal/reports", json=body) for _ in range(2)]
    found = [Answer[ReportsStored].parse(answer.content, "answer").data for answer in answers]
    assert [(each.stored, each.duplicates) for each in found] == [(2, 0), (0, 2)]


# --- bodies --------------------------------------------------------------------------------------


async def test_what_no_database_keeps_is_refused(stage: Stage) -> None:
    gpu = GpuFigures(
        name="g",
        memory_used_bytes=0,
        memory_total_bytes=0,
        utilization_percent=0,
        power_watts=0.0,
        temperature_celsius=0,
    ).model_dump()
    huge = 10**300
    bodies = [
        ("enrol", {"join_token": "x", "name": "a\0b"}),
        ("register", {"boot_id": "\0", "base_url": "http://g"}),
        ("register", {"boot_id": "b", "base_url": "http://\0"}),
        ("heartbeat", beat(epoch=huge)),
        ("heartbeat", beat(revision=2**63)),
        ("heartbeat", beat(restarts=huge)),
        ("heartbeat", beat(clock_offset_ms=-1e300)),
        ("heartbeat", beat(model_id="\0")),
        ("heartbeat", beat(problem="\0")),
        ("heartbeat", beat(gpus=[gpu | {"name": "\0"}])),
        ("heartbeat", beat(gpus=[gpu, gpu | {"memory_used_bytes": huge}])),
        ("reports", {"epoch": 1, "reports": [report(sequence=2**63)]}),
        ("reports", {"epoch": 1, "reports": [report(boot_id="\0")]}),
        ("reports", {"epoch": 1, "reports": [report(pledge_id="\0")]}),
        ("reports", {"epoch": 1, "reports": [report(seat={"output_tokens": 2**63})]}),
        ("reports", {"epoch": 1, "reports": [report(seat={"owed_tokens": 1e300})]}),
        ("reports", {"epoch": 1, "reports": [report(at="0001-01-01T00:00:00+14:00")]}),
        ("reports", {"epoch": 1, "reports": [report(at="9999-12-31T23:59:59-14:00")]}),
    ]
    async with stage.agent() as agent:
        for path, body in bodies:
            answer = await agent.post(f"/internal/{path}", content=json.dumps(body))
            assert "body: " in refused(answer, 422, "invalid_request")


async def test_what_is_not_the_contracts_is_refused(stage: Stage) -> None:
    bodies = [
        ("enrol", b""),
        ("enrol", b"\xff\xfe"),
        ("enrol", b'{"join_token": "\xff", "name": "n"}'),
        ("enrol", rb'{"join_token": "\ud800", "name": "n"}'),
        ("enrol", b"[" * 100_000),
        ("enrol", b'{"join_token": "x", "name": ""}'),
        ("enrol", b'{"join_token": "x", "name": "n", "\xf0\x9f\x92\xa5": 1}'),
        ("register", b'{"boot_id": "b", "base_url": "ftp://g"}'),
        ("heartbeat", json.dumps(beat(serving="asleep")).encode()),
        ("heartbeat", json.dumps(beat(epoch="1")).encode()),
        ("heartbeat", json.dumps(beat()).replace("-1.5", "NaN").encode()),
        ("heartbeat", json.dumps(beat()).replace("-1.5", "1e999").encode()),
        ("heartbeat", json.dumps(beat()).replace('"revision": 4', f'"revision": {"9" * 5000}').encode()),
        ("reports", b'{"epoch": 1, "reports": []}'),
        ("reports", json.dumps({"epoch": 1, "reports": [report()] * 101}).encode()),
        ("reports", json.dumps({"epoch": 1, "reports": [report(at="2026-03-10T12:00:00")]}).encode()),
        ("reports", json.dumps({"epoch": 1, "reports": [report(sequence=0)]}).encode()),
    ]
    async with stage.agent() as agent:
        for path, content in bodies:
            answer = await agent.post(f"/internal/{path}", content=content)
            assert "body: " in refused(answer, 422, "invalid_request")


async def test_a_fault_is_named_by_its_path(stage: Stage) -> None:
    batch = {"epoch": 1, "reports": [report(), report(seat={"input_tokens": 10**16})]}
    async with stage.agent() as agent:
        answer = await agent.post("/internal/reports", json=batch)
    message = refused(answer, 422, "invalid_request")
    assert message == "body: reports.1.seats.0.input_tokens: must not be beyond 1,000,000,000,000,000"


async def test_a_body_beyond_the_limit_is_not_read_to_its_end(stage: Stage) -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 1 << 20
            yield b" " * (1 << 20)

    async with stage.agent() as agent:
        for path in ("enrol", "register", "heartbeat", "reports"):
            sent = 0
            answer = await agent.post(f"/internal/{path}", content=endless())
            refused(answer, 413, "request_too_large")
            assert sent <= MAX_INTERNAL_BODY_BYTES + (2 << 20)


async def test_the_largest_batch_fits_into_one_query(stage: Stage) -> None:
    """As many pledges as fit into a body: PostgreSQL takes 32,767 parameters."""
    spare = MAX_INTERNAL_BODY_BYTES - 1_000
    seat = report()["seats"][0]
    each = len(json.dumps(seat, separators=(",", ":"))) + 6
    seats = [seat | {"pledge_id": f"{number:x}"} for number in range(spare // each)]
    batch = {"epoch": 1, "reports": [report(seats=seats)]}
    async with stage.agent() as agent:
        answer = await agent.post("/internal/reports", content=json.dumps(batch, separators=(",", ":")))
    assert answer.json()["data"] == {"stored": 1, "duplicates": 0}


async def test_a_query_that_means_nothing_is_refused(stage: Stage) -> None:
    async with stage.agent() as agent:
        for query in (
            "",
            "epoch=0",
            f"epoch={10**20}",
            f"epoch={'9' * 5000}",
            "epoch=one",
            "epoch=%ff",
            "epoch=1&revision=-1",
            f"epoch=1&revision={2**63}",
            "epoch=1&wait_s=-1",
            "epoch=1&wait_s=nan",
            "epoch=1&wait_s=inf",
        ):
            refused(await agent.get(f"/internal/orders?{query}"), 422, "invalid_request")


async def test_a_store_with_any_name_is_another_store(stage: Stage) -> None:
    async with stage.agent() as agent:
        for store_id in ("%00", "%ff", "%F0%9F%92%A5", "x" * 5000):
            answer = await agent.get(f"/internal/orders?epoch=1&store_id={store_id}&revision=5&wait_s=9")
            assert answer.status_code == 200


async def test_the_api_document_describes_the_bodies_in_place(stage: Stage) -> None:
    document = stage.app.openapi()
    for path, field in [
        ("enrol", "join_token"),
        ("register", "boot_id"),
        ("heartbeat", "gpus"),
        ("reports", "reports"),
    ]:
        body = document["paths"][f"/internal/{path}"]["post"]["requestBody"]
        schema = body["content"]["application/json"]["schema"]
        assert field in schema["required"]
        assert "$ref" not in json.dumps(schema)


async def test_times_in_answers_are_aware(stage: Stage) -> None:
    async with stage.agent() as agent:
        answer = await agent.post("/internal/heartbeat", json=beat())
    assert datetime.datetime.fromisoformat(answer.json()["data"]["at"]).tzinfo is not None


async def test_the_epoch_is_checked_in_the_transaction_that_writes(stage: Stage) -> None:
    """A replaced agent cannot slip in a heartbeat between the check and the write."""
    async with stage.database.write() as session:
        await session.execute(update(Node).values(epoch=2))
        # SQLite has one writer and PostgreSQL a lock on the row: either way this one waits.
        async with stage.agent() as agent:
            late = asyncio.create_task(agent.post("/internal/heartbeat", json=beat(restarts=99)))
            await asyncio.sleep(0.1)
            assert not late.done()
            await session.commit()
            refused(await asyncio.wait_for(late, PROMPT_S), 409, "stale_epoch")
