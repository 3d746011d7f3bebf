"""`Idempotency-Key`: a POST that is repeated with it has its effect once."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from control_plane.context import ControlPlane
from control_plane.envelope import ApiError
from control_plane.routing import _Call
from control_plane.vault import Vault
from tests.unit.control_plane.market import (
    BAD_CARD,
    FEE_CENTS,
    GOOD_CARD,
    Answer,
    Customer,
    Market,
    at_once,
    empty_ground,  # noqa: F401 - a fixture
    on_sqlite_only,
    open_market,  # noqa: F401 - a fixture
)

REPLAYED = "idempotent-replayed"


async def post(customer: Customer, path: str, body: Any, key: str = "once") -> Answer:
    return await customer.market.call("POST", path, body, key=customer.key, headers={"idempotency-key": key})


async def subscribe(customer: Customer, pool_id: str, key: str = "once", **changes: Any) -> Answer:
    return await post(customer, f"/api/pools/{pool_id}/subscribe", {"blocks": ["night"], **changes}, key)


async def kept(market: Market) -> int:
    [(count,)] = await market.rows("SELECT count(*) FROM idempotent_calls")
    return int(count)


async def test_a_repeated_call_gets_the_same_answer_and_runs_once(market: Market) -> None:
    pool_id = await market.live_pool()
    customer = await market.customer()
    before = await market.taken()
    first = await subscribe(customer, pool_id)
    again = await subscribe(customer, pool_id)
    assert first.data == again.data
    assert first.data["key"]["apiKey"]
    assert REPLAYED not in first.headers
    assert again.headers[REPLAYED] == "true"
    assert sorted(await market.taken()) == sorted([*before, FEE_CENTS, 2_700])


async def test_a_key_that_was_used_for_another_request_is_refused(market: Market) -> None:
    pool_id, other = await market.pool(), await market.pool()
    customer = await market.customer()
    _ = (await subscribe(customer, pool_id)).data
    reused = (422, "idempotency_key_reused")
    assert (await subscribe(customer, pool_id, quantity=2)).refusal == reused
    assert (await subscribe(customer, other)).refusal == reused
    assert (await post(customer, "/api/billing/payment-method", {})).refusal == reused
    assert await customer.status(other) == "none"
    assert (await subscribe(customer, other, "another")).status == 200


@on_sqlite_only
async def test_a_key_is_its_accounts_own(market: Market) -> None:
    pool_id = await market.pool()
    first, second = await market.customer(), await market.customer()
    answers = [await subscribe(first, pool_id), await subscribe(second, pool_id)]
    assert answers[0].data["id"] != answers[1].data["id"]
    assert await market.pledged_slots(pool_id) == 2


@on_sqlite_only
async def test_a_refusal_is_not_kept(market: Market) -> None:
    pool_id = await market.pool()
    customer = await market.customer(card=None)
    assert (await subscribe(customer, pool_id)).refusal == (402, "payment_method_required")
    assert (await subscribe(customer, pool_id, quantity=99)).refusal == (422, "invalid_request")
    _ = (await customer.put_card(BAD_CARD)).data
    assert (await subscribe(customer, pool_id)).refusal == (402, "card_declined")
    assert await kept(market) == 0
    _ = (await customer.put_card(GOOD_CARD)).data
    assert (await subscribe(customer, pool_id)).data["status"] == "pledged"


@on_sqlite_only
async def test_a_call_that_fails_on_our_side_is_not_kept(market: Market) -> None:
    pool_id = await market.pool()
    customer = await market.customer()
    market.gateway.down = True
    assert (await subscribe(customer, pool_id)).refusal == (503, "payment_unavailable")
    assert await kept(market) == 0
    assert (await subscribe(customer, pool_id)).refusal == (409, "payment_pending")


async def test_answers_are_kept_for_a_day(market: Market) -> None:
    customer = await market.customer()
    path, body = "/api/billing/payment-method", {"paymentMethod": GOOD_CARD}
    _ = (await post(customer, path, body)).data
    await market.wait(hours=24)
    assert REPLAYED in (await post(customer, path, body)).headers
    await market.wait(seconds=1)
    assert await kept(market) == 0
    assert REPLAYED not in (await post(customer, path, body)).headers


async def test_of_equal_calls_at_once_one_runs(market: Market) -> None:
    pool_id = await market.pool()
    customer = await market.customer()
    answers = await at_once(*[subscribe(customer, pool_id) for _ in range(6)])
    done = [answer for answer in answers if answer.status == 200]
    assert {answer.data["id"] for answer in done} == {done[0].data["id"]}
    assert sum(REPLAYED not in answer.headers for answer in done) == 1
    waiting = [answer for answer in answers if answer.status != 200]
    assert {answer.refusal for answer in waiting} <= {(409, "idempotency_in_progress")}
    assert all(answer.headers["retry-after"] == "1" for answer in waiting)
    assert await market.taken() == [FEE_CENTS]
    assert REPLAYED in (await subscribe(customer, pool_id)).headers


async def test_a_call_that_died_with_its_process_can_be_made_again_after_a_minute(market: Market) -> None:
    pool_id = await market.pool()
    customer = await market.customer()
    charging = asyncio.Event()

    async def hang(*arguments: Any) -> Any:
        charging.set()
        await asyncio.Event().wait()

    charge, market.gateway.charge = market.gateway.charge, hang  # type: ignore[method-assign,assignment]
    call = asyncio.create_task(subscribe(customer, pool_id))
    await charging.wait()
    assert await kept(market) == 1
    market.clock.advance(60)
    assert (await subscribe(customer, pool_id)).refusal == (409, "idempotency_in_progress")
    market.clock.advance(1)
    market.gateway.charge = charge  # type: ignore[method-assign]
    assert (await subscribe(customer, pool_id)).refusal == (409, "payment_pending")
    call.cancel()
    await asyncio.wait([call])


async def test_of_calls_that_begin_at_the_very_same_moment_one_runs(market: Market) -> None:
    """Where the database is busy, one may look before, and act after, another one has begun."""
    customer = await market.customer()
    for round_ in range(10):
        calls = [_Call(market.context, customer.id, f"key {round_}", "request") for _ in range(4)]
        begun = await at_once(*[begin(call) for call in calls])
        assert begun.count("runs") == 1
        assert begun.count("idempotency_in_progress") == 3


async def begin(call: _Call) -> str:
    try:
        assert await call.begin() is None
    except ApiError as refusal:
        return refusal.code
    return "runs"


@on_sqlite_only
async def test_only_printable_keys_of_some_length_are_taken(market: Market) -> None:
    customer = await market.customer()
    path, body = "/api/billing/payment-method", {"paymentMethod": GOOD_CARD}
    for key in ("", "a" * 256, "a\tb", "\x7f"):
        assert (await post(customer, path, body, key)).refusal == (422, "invalid_request"), key
    assert (await post(customer, path, body, "a" * 255)).status == 200


@on_sqlite_only
async def test_nothing_is_kept_for_strangers(market: Market) -> None:
    stranger = Customer(market, "", "mk_nobody")
    assert (await subscribe(stranger, await market.pool())).refusal == (401, "unauthorized")
    assert await kept(market) == 0


@on_sqlite_only
async def test_what_is_shown_once_is_not_in_the_database(market: Market) -> None:
    operator = Customer(market, "", market.operator_key)
    answer = await post(operator, "/api/admin/accounts", {"name": "Ada", "email": "ada@example.com"})
    key = answer.data["managementKey"]
    assert (
        await post(operator, "/api/admin/accounts", {"name": "Ada", "email": "ada@example.com"})
    ).data == {
        "id": answer.data["id"],
        "managementKey": key,
    }
    customer = Customer(market, answer.data["id"], key)
    _ = (await customer.put_card(GOOD_CARD)).data
    boost_key = (await subscribe(customer, await market.live_pool())).data["key"]["apiKey"]
    assert await kept(market) == 2
    [(_, _, path)] = await market.rows("PRAGMA database_list")
    stored = b"".join(file.read_bytes() for file in Path(path).parent.glob(Path(path).name + "*"))
    assert b"ada@example.com" in stored
    for secret in (key, boost_key, market.operator_key):
        assert secret.encode() not in stored
        assert secret.encode()[10:30] not in stored


@on_sqlite_only
async def test_an_answer_that_cannot_be_read_is_an_error_and_no_second_run(market: Market) -> None:
    customer = await market.customer()
    pool_id = await market.pool()
    _ = (await subscribe(customer, pool_id)).data
    context = market.context
    other = ControlPlane(
        context.database, context.clock, context.gateway, Vault(b"x" * 32), context.public_url
    )
    blind = await Market.open(other, market.clock, show_errors=False)
    async with blind.client:
        answer = await subscribe(Customer(blind, customer.id, customer.key), pool_id)
    assert answer.refusal == (500, "internal_error")
    assert await market.taken() == [FEE_CENTS]
