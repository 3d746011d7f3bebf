"""The control plane as a process, on real databases: crowds that buy at once, and calls nobody foresaw."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import pytest

from serving.family import stop_with_parent
from tests.contract.documents import capacity
from tests.integration.conftest import free_port, stop_group, wait_for
from tests.unit.control_plane.conftest import (
    database_url,
    postgres_template,
    postgres_url,
    sqlite_template,
)

pytestmark = pytest.mark.slow

__all__ = ["database_url", "postgres_template", "postgres_url", "sqlite_template"]  # fixtures

CROWD = 50
SEATS = 20
TERMS: dict[str, Any] = {
    "slug": "crowded",
    "modelId": "model",
    "modelName": "Model",
    "blocks": {name: {"seats": SEATS, "monthlyPrice": "27.00"} for name in ("night", "europe")},
    "minSeats": 2 * SEATS,
    "guaranteeTokS": 20,
    "rpmLimit": 60,
    "tpmLimit": 1000,
    "declaredCapacity": capacity(model_id="model"),
}


@dataclass
class Servers:
    """Control planes on one database, and an operator's key for them."""

    urls: list[str]
    operator_key: str


@pytest.fixture
def servers(database_url: str, tmp_path: Path) -> Iterator[Servers]:
    """One control plane on an SQLite database, two that share a PostgreSQL one."""
    command = (sys.executable, "-m", "control_plane.main", "--home", str(tmp_path))
    environment = {**os.environ, "BOOSTS_DATABASE_URL": database_url}
    made = subprocess.run(
        [*command, "--new-operator", "ops@example.com"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    ports = [free_port() for _ in range(1 if database_url.startswith("sqlite") else 2)]
    with (tmp_path / "log").open("wb") as log:
        processes = [
            subprocess.Popen(
                [*command, "--port", str(port)],
                env=environment,
                stdout=log,
                stderr=log,
                process_group=0,
                preexec_fn=stop_with_parent,  # noqa: PLW1509 - no other thread holds a lock of the loader's
            )
            for port in ports
        ]
    urls = [f"http://127.0.0.1:{port}" for port in ports]
    try:
        for url in urls:
            wait_for(lambda url=url: answers(url), 30)  # type: ignore[misc]  # bound in the loop
        yield Servers(urls, made.stdout.strip())
    finally:
        for process in processes:
            stop_group(process)
        assert "Traceback" not in (tmp_path / "log").read_text()


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz").status_code == 200
    except httpx.TransportError:
        return False


@dataclass
class Caller:
    """An account at one of the control planes."""

    http: aiohttp.ClientSession
    url: str
    key: str

    async def call(self, method: str, path: str, body: object = None) -> tuple[int, Any]:
        headers = {"Authorization": f"Bearer {self.key}"}
        async with self.http.request(method, self.url + path, json=body, headers=headers) as answer:
            return answer.status, await answer.json()

    async def data(self, method: str, path: str, body: object = None) -> Any:
        status, answer = await self.call(method, path, body)
        assert status == 200, answer
        return answer["data"]

    async def put_card(self, card: str) -> None:
        await self.data("POST", "/api/billing/payment-method", {"paymentMethod": card})

    async def subscribe(self, order: object) -> tuple[int, str | None]:
        """Status, and the code of a refusal."""
        status, answer = await self.call("POST", "/api/pools/crowded/subscribe", order)
        return status, None if status == 200 else answer["error"]["code"]

    async def hours(self) -> int:
        """Of the account's pledge, if it has one."""
        status, answer = await self.call("GET", "/api/pools/crowded/my-pledge")
        return len(answer["data"]["hours"]) if status == 200 else 0


@asynccontextmanager
async def crowd_at(servers: Servers) -> AsyncIterator[list[Caller]]:
    """Accounts with good cards, spread over the servers, before a pool with `SEATS` in each of two blocks."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=2 * CROWD)) as http:
        operator = Caller(http, servers.urls[0], servers.operator_key)
        await operator.data("POST", "/api/admin/pools", TERMS)
        await operator.data("POST", "/api/admin/pools/crowded/open")
        crowd = []
        for number in range(CROWD):
            person = {"name": f"Customer {number}", "email": f"c{number}@example.com"}
            made = await operator.data("POST", "/api/admin/accounts", person)
            crowd.append(Caller(http, servers.urls[number % len(servers.urls)], made["managementKey"]))
        await asyncio.gather(*(caller.put_card("pm_card_visa") for caller in crowd))
        yield crowd


async def reserved(caller: Caller) -> Counter[str]:
    slots = (await caller.data("GET", "/api/pools/crowded"))["hourSlots"]
    return Counter(slot["status"] for slot in slots)


async def test_of_fifty_at_once_exactly_twenty_get_the_last_twenty_seats(servers: Servers) -> None:
    async with crowd_at(servers) as crowd:
        # Both blocks, asked for in either order: whoever gets one gets the other.
        orders = [{"blocks": ["night", "europe"][:: (-1) ** number]} for number in range(CROWD)]
        asked = zip(crowd, orders, strict=True)
        outcomes = Counter(await asyncio.gather(*(caller.subscribe(order) for caller, order in asked)))
        assert outcomes == {(200, None): SEATS, (409, "sold_out"): CROWD - SEATS}
        hours = Counter(await asyncio.gather(*(caller.hours() for caller in crowd)))
        assert hours == {16: SEATS, 0: CROWD - SEATS}
        assert await reserved(crowd[0]) == {"pledged": 2 * 8 * SEATS}


async def test_declined_cards_take_no_seat_from_those_who_pay(servers: Servers) -> None:
    async with crowd_at(servers) as crowd:
        payers, others = crowd[::2], crowd[1::2]
        await asyncio.gather(*(caller.put_card("pm_card_chargeDeclined") for caller in others))
        order = {"blocks": ["night"], "quantity": 1}

        async def insist(caller: Caller) -> tuple[int, str | None]:
            outcome = await caller.subscribe(order)
            for _ in range(20):
                # Sold out while others' cards are being charged is not sold out for good.
                if outcome != (409, "sold_out") or caller in others:
                    break
                await asyncio.sleep(0.2)
                outcome = await caller.subscribe(order)
            return outcome

        outcomes = await asyncio.gather(*map(insist, crowd))
        assert Counter(outcomes[::2]) == {(200, None): SEATS, (409, "sold_out"): len(payers) - SEATS}
        assert set(outcomes[1::2]) <= {(402, "card_declined"), (409, "sold_out")}
        assert await reserved(crowd[0]) == {"pledged": 8 * SEATS, "available": 8 * SEATS}


async def test_one_account_gets_one_pledge_however_often_it_asks_at_once(servers: Servers) -> None:
    async with crowd_at(servers) as crowd:
        caller = crowd[0]
        outcomes = await asyncio.gather(*(caller.subscribe({"blocks": ["night"]}) for _ in range(20)))
        assert Counter(status for status, _ in outcomes) == {200: 1, 409: 19}
        assert {code for _, code in outcomes} <= {None, "pledge_exists", "payment_pending"}
        assert await caller.hours() == 8


def test_every_call_answers_as_its_document_says(
    servers: Servers, database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It leaves a folder of its own where it runs.
    monkeypatch.chdir(tmp_path)
    url = servers.urls[0]
    # Each database has half of it: together they take a minute.
    phase = "fuzzing" if database_url.startswith("sqlite") else "coverage"
    operator = {"Authorization": f"Bearer {servers.operator_key}"}
    httpx.post(f"{url}/api/admin/pools", json=TERMS, headers=operator).raise_for_status()
    joined = httpx.post(f"{url}/api/admin/pools/crowded/join-tokens", headers=operator).json()["data"]
    enrolment = {"join_token": joined["joinToken"], "name": "node"}
    node = httpx.post(f"{url}/internal/enrol", json=enrolment).json()["data"]
    fuzz(url, servers.operator_key, phase, "--exclude-path-regex", "^/internal")
    fuzz(url, node["node_token"], phase, "--include-path-regex", "^/internal")


def fuzz(url: str, key: str, phase: str, *which: str) -> None:
    """Call every path with what it allows and what it does not, and hold the answers to /openapi.json."""
    done = subprocess.run(
        [
            *(str(Path(sys.executable).with_name("schemathesis")), "run", f"{url}/openapi.json", *which),
            *("--header", f"Authorization: Bearer {key}", "--phases", phase),
            *("--max-examples", "10", "--seed", "1", "--generation-database", "none", "--no-color"),
            *("--checks", "not_a_server_error,status_code_conformance"),
            *("--checks", "content_type_conformance,response_schema_conformance"),
        ],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
