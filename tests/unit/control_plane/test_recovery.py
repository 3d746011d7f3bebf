"""When something is wrong for long: customers and operators get out, and what is well goes on."""

from __future__ import annotations

import datetime

import pytest

from control_plane.clock import add_months
from control_plane.pledges import lifecycle
from control_plane.pools.tables import Pool
from tests.unit.control_plane.market import (
    BAD_CARD,
    FEE_CENTS,
    GOOD_CARD,
    Customer,
    Market,
    empty_ground,  # noqa: F401 - a fixture
    open_market,  # noqa: F401 - a fixture
)

pytestmark = pytest.mark.slow


async def period_end(customer: Customer, pool: str) -> datetime.datetime:
    return datetime.datetime.fromisoformat((await customer.my_pledge(pool)).data["currentPeriodEnd"])


async def test_seats_held_for_a_silent_gateway_can_be_given_up(market: Market) -> None:
    pool = await market.live_pool()
    before = await market.taken()
    customer = await market.customer()
    market.gateway.mute = True
    assert (await customer.subscribe(pool)).refusal == (503, "payment_unavailable")
    again = await customer.subscribe(pool)
    assert again.refusal == (409, "payment_pending")
    assert again.headers["retry-after"] == "60"
    assert (await customer.withdraw(pool)).data == {"canceled": True}
    assert await market.pledged_slots(pool) == 1
    market.gateway.mute = False
    await market.wait(seconds=10)
    assert await market.taken() == before
    assert (await customer.subscribe(pool)).data["status"] == "active"


async def test_one_pool_that_fails_keeps_no_other_from_its_due(
    market: Market, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken, healthy = await market.pool(min_seats=1), await market.live_pool()
    customer = await market.customer()
    _ = (await customer.subscribe(healthy, "europe")).data
    crossed_threshold = lifecycle._crossed_threshold

    async def fail_for_one(session: object, pool: Pool) -> bool:
        if pool.id == broken:
            raise RuntimeError("a row that nobody expected")
        return await crossed_threshold(session, pool)  # type: ignore[arg-type]  # handed on as it came

    monkeypatch.setattr(lifecycle, "_crossed_threshold", fail_for_one)
    market.clock.now = await period_end(customer, healthy)
    for _ in range(3):
        with pytest.raises(ExceptionGroup):
            await market.lifecycle.tick()
    assert await period_end(customer, healthy) > market.clock.now


async def test_retired_nodes_pledges_move_with_their_keys(market: Market) -> None:
    pool = await market.live_pool()
    [(old,)] = await market.rows("SELECT id FROM nodes")
    customer = await market.customer()
    key = (await customer.subscribe(pool)).data["key"]
    assert key["baseUrl"] == f"http://{old}:8001"
    retired = (await market.operate("POST", f"/nodes/{old}/retire")).data
    assert (retired["state"], retired["ready"], retired["pledges"]) == ("retired", False, 0)
    assert (await customer.my_key(pool)).data == key | {"baseUrl": None}
    new = await market.node(pool)
    await market.settle()
    assert (await customer.my_key(pool)).data == key | {"baseUrl": f"http://{new}:8001"}
    assert (await market.operate("POST", f"/nodes/{old}/undrain")).refusal == (409, "node_retired")


async def test_engine_args_of_an_open_pool_can_be_mended_and_nothing_else(market: Market) -> None:
    pool = await market.pool()
    revision = await market.revision(pool)
    mended = await market.operate("PATCH", f"/pools/{pool}", {"engineArgs": {"max-num-seqs": 8}})
    assert mended.data["engineArgs"] == ["--max-num-seqs", "8"]
    assert mended.data["revision"] > revision
    for change in ({"guaranteeTokS": 1}, {"engineArgs": [], "minSeats": 1}):
        refused = await market.operate("PATCH", f"/pools/{pool}", change)
        assert refused.refusal == (409, "wrong_pool_status")


@pytest.mark.parametrize("card", [GOOD_CARD, BAD_CARD])
async def test_month_that_was_due_when_a_pause_began_is_whole_after_it(market: Market, card: str) -> None:
    pool = await market.live_pool()
    customer = await market.customer()
    _ = (await customer.subscribe(pool)).data
    _ = (await customer.put_card(card)).data
    due = await period_end(customer, pool)
    market.gateway.down = card == GOOD_CARD
    await market.wait_until(due)
    _ = (await market.operate("POST", f"/pools/{pool}/pause")).data
    market.gateway.down = False
    await market.wait(days=20)
    _ = (await customer.put_card(GOOD_CARD)).data
    _ = (await market.operate("POST", f"/pools/{pool}/resume")).data
    await market.wait(seconds=10)
    assert await customer.status(pool) == "active"
    assert await period_end(customer, pool) - market.clock.now > datetime.timedelta(days=27)


async def test_subscription_canceled_after_its_month_is_not_charged_again(market: Market) -> None:
    pool = await market.live_pool()
    customer = await market.customer()
    pledge = (await customer.subscribe(pool)).data["id"]
    paid = await market.taken()
    market.gateway.down = True
    await market.wait_until(await period_end(customer, pool))
    _ = (await market.operate("POST", f"/pools/{pool}/pause")).data
    assert (await customer.cancel(pledge)).data["status"] == "canceled"
    market.gateway.down = False
    await market.wait(days=1)
    _ = (await market.operate("POST", f"/pools/{pool}/resume")).data
    await market.wait(seconds=10)
    # The first customer's next month is the only new charge.
    assert len(await market.taken()) == len(paid) + 1
    assert FEE_CENTS in paid


async def test_months_that_nobody_could_use_because_we_were_away_are_not_charged(market: Market) -> None:
    pool = await market.live_pool()
    customer = await market.customer()
    _ = (await customer.subscribe(pool)).data
    before = await market.taken()
    market.clock.now = await period_end(customer, pool) + datetime.timedelta(days=100)
    await market.settle(10)
    # One month each for the two customers, and it begins now.
    assert len(await market.taken()) == len(before) + 2
    assert await period_end(customer, pool) > market.clock.now + datetime.timedelta(days=27)


async def test_renewal_that_is_late_by_less_begins_where_the_last_month_ended(market: Market) -> None:
    pool = await market.live_pool()
    customer = await market.customer()
    _ = (await customer.subscribe(pool)).data
    end = await period_end(customer, pool)
    await market.wait_until(end + datetime.timedelta(hours=71))
    assert await period_end(customer, pool) == add_months(market_start(end), 2)


def market_start(end: datetime.datetime) -> datetime.datetime:
    """When the month began that ends then."""
    return add_months(end, -1)


async def test_new_management_key_takes_the_place_of_all_others(market: Market) -> None:
    customer = await market.customer()
    made = (await market.operate("POST", f"/accounts/{customer.id}/management-key")).data
    assert (await customer.portal()).refusal == (401, "unauthorized")
    customer.key = made["managementKey"]
    assert (await customer.portal()).data == {"poolPledges": []}
    unknown = await market.operate("POST", "/accounts/nobody/management-key")
    assert unknown.refusal == (404, "account_not_found")


async def test_charges_show_what_was_taken_declined_and_given_back(market: Market) -> None:
    pool = await market.live_pool()
    customer, other = await market.customer(BAD_CARD), await market.customer()
    assert (await customer.subscribe(pool)).refusal == (402, "card_declined")
    _ = (await customer.put_card(GOOD_CARD)).data
    _ = (await customer.subscribe(pool)).data
    shown = (await customer.call("GET", "/api/billing/charges")).data
    assert sorted((charge["purpose"], charge["status"], charge["amount"]) for charge in shown) == [
        ("first_month", "paid", "27.00"),
        ("reservation", "declined", "1.00"),
        ("reservation", "paid", "1.00"),
    ]
    assert (await other.call("GET", "/api/billing/charges")).data == []


async def test_every_pause_of_a_month_is_added_to_it(market: Market) -> None:
    pool = await market.live_pool()
    customer = await market.customer()
    _ = (await customer.subscribe(pool)).data
    paid, end = await market.taken(), await period_end(customer, pool)
    for pause in (datetime.timedelta(days=1), datetime.timedelta(hours=1), datetime.timedelta(days=3)):
        market.clock.now += datetime.timedelta(days=2)
        _ = (await market.operate("POST", f"/pools/{pool}/pause")).data
        market.clock.now += pause
        _ = (await market.operate("POST", f"/pools/{pool}/resume")).data
        await market.settle()
        end += pause
        assert await period_end(customer, pool) == end
    assert await market.taken() == paid
