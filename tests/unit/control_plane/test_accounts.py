"""Accounts, their management keys, and who is let in."""

from __future__ import annotations

from typing import Any

import pytest

from contract.keys import KeyKind, is_key, key_sha256, new_key
from control_plane.accounts.service import new_operator_key
from control_plane.accounts.tables import Role
from control_plane.envelope import ApiError
from tests.unit.control_plane.conftest import add_account, add_node, add_pool
from tests.unit.control_plane.market import (
    Market,
    empty_ground,  # noqa: F401 - a fixture
    on_sqlite_only,
    open_market,  # noqa: F401 - a fixture
)

PERSON = {"name": "Ada", "email": "ada@example.com"}


@on_sqlite_only
async def test_a_new_account_gets_its_key_in_this_answer_only(market: Market) -> None:
    market.clock.advance(1)
    made = (await market.operate("POST", "/accounts", PERSON)).data
    assert set(made) == {"id", "managementKey"}
    key = made["managementKey"]
    assert is_key(key, KeyKind.MANAGEMENT)
    assert (await market.call("GET", "/api/pools", key=key)).data == []
    query = "SELECT key_sha256 FROM management_keys WHERE account_id = :account"
    [[stored]] = await market.rows(query, account=made["id"])
    assert stored == key_sha256(key)
    listed = (await market.operate("GET", "/accounts")).data
    assert key not in str(listed)
    assert [set(account) for account in listed] == [{"id", "name", "email", "role", "createdAt"}] * 2
    assert [account["role"] for account in listed] == ["operator", "customer"]


async def test_an_email_has_one_account_however_it_is_written(market: Market) -> None:
    _ = (await market.operate("POST", "/accounts", PERSON)).data
    again = await market.operate("POST", "/accounts", {**PERSON, "email": "ADA@Example.com"})
    assert again.refusal == (409, "email_taken")


@on_sqlite_only
async def test_an_invalid_person_is_refused(market: Market) -> None:
    persons: list[Any] = [
        {},
        {"name": "Ada"},
        {**PERSON, "email": "no address"},
        {**PERSON, "email": "a@b@c"},
        {**PERSON, "email": "ß" * 200 + "@b"},
        {**PERSON, "email": "a" * 320 + "@b"},
        {**PERSON, "email": "a\x00@b"},
        {**PERSON, "name": ""},
        {**PERSON, "name": "x" * 201},
        {**PERSON, "name": "\x00"},
        {**PERSON, "name": None},
        {**PERSON, "role": "operator"},
        [],
    ]
    for person in persons:
        answer = await market.operate("POST", "/accounts", person)
        assert answer.refusal == (422, "invalid_request"), person
        assert all(set(fault) == {"field", "message"} for fault in answer.error["details"])


async def test_the_longest_person_can_be_kept(market: Market) -> None:
    longest = {"name": "ü" * 200, "email": "ü" * 318 + "@b"}
    assert (await market.operate("POST", "/accounts", longest)).status == 200


@on_sqlite_only
async def test_operators_get_further_keys_and_customers_do_not_become_operators(market: Market) -> None:
    async with market.database.write() as session:
        key = await new_operator_key(session, "OPS@example.com", market.clock())
    assert (await market.call("GET", "/api/admin/accounts", key=key)).status == 200
    assert (await market.call("GET", "/api/admin/accounts", key=market.operator_key)).status == 200
    _ = (await market.operate("POST", "/accounts", PERSON)).data
    with pytest.raises(ApiError, match="operators need one of their own"):
        async with market.database.write() as session:
            await new_operator_key(session, PERSON["email"], market.clock())


@on_sqlite_only
async def test_nobody_comes_in_without_a_key_of_the_right_kind(market: Market) -> None:
    customer = await market.customer()
    pool = await add_pool(market.database)
    _, node_key = await add_node(market.database, pool)
    credentials = [
        None,
        "",
        "Bearer",
        "Bearer ",
        f"Basic {customer.key}",
        customer.key,
        f"Bearer {customer.key[:-1]}",
        f"Bearer {customer.key}x",
        f"Bearer {new_key(KeyKind.MANAGEMENT)}",
        f"Bearer {new_key(KeyKind.BOOST)}",
        f"Bearer {node_key}",
        "Bearer mk_",
        "Bearer \xff\xfe",
    ]
    for sent in credentials:
        headers = [] if sent is None else [(b"authorization", sent.encode("latin-1"))]
        for path in ("/api/pools", "/api/admin/pools", "/api/billing/portal"):
            response = await market.client.get(path, headers=headers)
            assert response.status_code == 401, sent
            assert response.json()["error"]["code"] == "unauthorized"
            assert response.headers["www-authenticate"] == "Bearer"
    answer = await market.call("GET", "/internal/orders?epoch=1&revision=0&wait_s=0", key=customer.key)
    assert answer.refusal == (401, "unauthorized")


@on_sqlite_only
async def test_only_operators_open_the_operators_addresses(market: Market) -> None:
    _, key = await add_account(market.database, Role.CUSTOMER)
    pool_id = await market.draft()
    for method, path in (
        ("GET", "/accounts"),
        ("POST", "/accounts"),
        ("GET", "/pools"),
        ("POST", "/pools"),
        ("GET", f"/pools/{pool_id}"),
        ("PATCH", f"/pools/{pool_id}"),
        ("POST", f"/pools/{pool_id}/open"),
        ("POST", f"/pools/{pool_id}/pause"),
        ("POST", f"/pools/{pool_id}/resume"),
        ("POST", f"/pools/{pool_id}/join-tokens"),
        ("GET", f"/pools/{pool_id}/throughput"),
        ("GET", "/nodes"),
        ("POST", "/nodes/none/drain"),
        ("POST", "/nodes/none/undrain"),
    ):
        answer = await market.call(method, f"/api/admin{path}", {} if method != "GET" else None, key=key)
        assert answer.refusal == (403, "operator_required"), path
    assert await market.status(pool_id) == "draft"
