"""Every answer comes in the envelope, whatever was sent."""

from __future__ import annotations

import json
from typing import Any

import pytest
from starlette.routing import Route

from control_plane.app import create_app
from control_plane.body_limit import MAX_BODY_BYTES
from tests.unit.control_plane.market import (
    Market,
    empty_ground,  # noqa: F401 - a fixture
    on_sqlite_only,
    open_market,  # noqa: F401 - a fixture
)

JSON = {"content-type": "application/json"}


@on_sqlite_only
async def test_an_address_where_nothing_is_answers_404(market: Market) -> None:
    for path in ("/", "/api", "/api/pools/", "/api/pools/a/b", "/api/pools/a%2Fb/c", "/x" * 2_000):
        assert (await market.call("GET", path, key=market.operator_key)).refusal == (404, "not_found")


@on_sqlite_only
async def test_a_method_that_an_address_does_not_take_is_405_and_says_which_it_takes(market: Market) -> None:
    addresses: dict[str, set[str]] = {}
    for route in create_app(market.context).routes:
        if isinstance(route, Route) and route.path.startswith(("/api", "/internal", "/healthz", "/readyz")):
            addresses.setdefault(route.path, set()).update(route.methods or ())
    assert len(addresses) > 25
    for path, methods in addresses.items():
        for method in {"GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"} - methods:
            answer = await market.call(
                method, path.replace("{", "").replace("}", ""), key=market.operator_key
            )
            assert answer.refusal == (405, "method_not_allowed"), path
            assert answer.headers["allow"]


@on_sqlite_only
async def test_a_body_that_is_none_is_refused_as_such(market: Market) -> None:
    customer = await market.customer()
    path = f"/api/pools/{await market.pool()}/subscribe"
    for content, status, code in (
        (b"", 422, "invalid_request"),
        (b"null", 422, "invalid_request"),
        (b"[]", 422, "invalid_request"),
        (b'"night"', 422, "invalid_request"),
        (b"{", 422, "invalid_request"),
        (b'{"blocks": ["night"]} trailing', 422, "invalid_request"),
        (b'{"blocks": ["\\ud800"]}', 422, "invalid_request"),
        (b'{"blocks": ["night"], "\\ud800": 1}', 422, "invalid_request"),
        (b'{"blocks": ["night"], "quantity": NaN}', 422, "invalid_request"),
        (b"\xff", 400, "bad_request"),
        (b"[" * 100_000, 400, "bad_request"),
        (b'{"blocks": ["night"], "quantity": ' + b"9" * 5_000 + b"}", 400, "bad_request"),
    ):
        answer = await market.call("POST", path, key=customer.key, content=content, headers=JSON)
        assert answer.refusal == (status, code), content[:50]
    assert await market.rows("SELECT * FROM pledges") == []


@on_sqlite_only
async def test_a_body_that_says_it_is_no_json_is_refused(market: Market) -> None:
    customer = await market.customer()
    path = f"/api/pools/{await market.pool()}/subscribe"
    form = "application/x-www-form-urlencoded"
    for content_type in ("", "text/plain", "garbage", form, "multipart/form-data"):
        headers = {"content-type": content_type}
        body = b'{"blocks": ["night"]}'
        answer = await market.call("POST", path, key=customer.key, content=body, headers=headers)
        assert answer.refusal == (422, "invalid_request"), content_type


@on_sqlite_only
@pytest.mark.parametrize("headers", [{}, {"idempotency-key": "a"}], ids=["once", "repeatable"])
async def test_a_body_beyond_the_limit_is_413_and_does_nothing(
    market: Market, headers: dict[str, str]
) -> None:
    customer = await market.customer()
    pool_id = await market.pool()
    body = json.dumps({"blocks": ["night"]}).encode()

    async def send(content: bytes) -> Any:
        return await market.call(
            "POST",
            f"/api/pools/{pool_id}/subscribe",
            key=customer.key,
            content=content,
            headers={**JSON, **headers},
        )

    answer = await send(body + b" " * (MAX_BODY_BYTES - len(body) + 1))
    assert answer.refusal == (413, "request_too_large")
    assert await market.rows("SELECT * FROM pledges") == []
    assert (await send(body + b" " * (MAX_BODY_BYTES - len(body)))).status == 200


@on_sqlite_only
async def test_an_error_of_ours_tells_nothing_of_our_insides(
    market: Market, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("secret")

    monkeypatch.setattr("control_plane.pools.routes.service.reserved_seats", fail)
    blind = await Market.open(market.context, market.clock, show_errors=False)
    async with blind.client:
        answer = await blind.call("GET", "/api/pools", key=market.operator_key)
    assert answer.refusal == (500, "internal_error")
    assert "secret" not in str(answer.body)


@on_sqlite_only
async def test_health_is_told_to_everybody(market: Market) -> None:
    assert (await market.call("GET", "/healthz")).data == {"ok": True}
    assert (await market.call("GET", "/readyz")).data == {"ok": True}
