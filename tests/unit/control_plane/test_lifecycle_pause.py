"""In a paused pool paid time stands still, and so does money."""

from __future__ import annotations

import datetime

import pytest

from control_plane.clock import add_months, iso
from tests.unit.control_plane.market import (
    BAD_CARD,
    FEE_CENTS,
    GOOD_CARD,
    Customer,
    Market,
    empty_ground,  # noqa: F401 - a fixture
    on_sqlite_only,
    open_market,  # noqa: F401 - a fixture
)

pytestmark = pytest.mark.slow

DAY = datetime.timedelta(days=1)


async def subscriber(market: Market, pool_id: str) -> Customer:
    customer = await market.customer()
    assert (await customer.subscribe(pool_id)).data["status"] == "active"
    return customer


async def pause(market: Market, pool_id: str) -> None:
    _ = (await market.operate("POST", f"/pools/{pool_id}/pause")).data


async def resume(market: Market, pool_id: str) -> None:
    _ = (await market.operate("POST", f"/pools/{pool_id}/resume")).data


async def end_of(customer: Customer, pool_id: str) -> str:
    return str((await customer.my_pledge(pool_id)).data["currentPeriodEnd"])


@on_sqlite_only
async def test_a_pause_moves_the_end_of_the_paid_month(market: Market) -> None:
    pool_id = await market.live_pool()
    customer = await subscriber(market, pool_id)
    start, key = market.clock(), (await customer.my_key(pool_id)).data
    await market.wait(days=10)
    await pause(market, pool_id)
    taken = await market.taken()
    await market.wait(days=100)
    assert await customer.status(pool_id) == "active"
    assert (await customer.my_key(pool_id)).data == key
    await resume(market, pool_id)
    await market.settle()
    assert await end_of(customer, pool_id) == iso(add_months(start, 1) + 100 * DAY)
    assert await market.taken() == taken


async def test_every_pause_of_a_month_moves_its_end(market: Market) -> None:
    pool_id = await market.live_pool()
    customer = await subscriber(market, pool_id)
    start, taken = market.clock(), await market.taken()
    for days in (1, 2, 3):
        await market.wait(days=4)
        await pause(market, pool_id)
        await market.wait(days=days)
        await resume(market, pool_id)
        await market.settle()
    assert await end_of(customer, pool_id) == iso(add_months(start, 1) + 6 * DAY)
    assert await market.taken() == taken


@on_sqlite_only
async def test_the_month_after_a_pause_is_a_whole_one(market: Market) -> None:
    market.clock.now = datetime.datetime(2027, 1, 15, 12, tzinfo=datetime.UTC)
    pool_id = await market.live_pool()
    customer = await subscriber(market, pool_id)
    await market.wait(days=5)
    await pause(market, pool_id)
    await market.wait(days=20)
    await resume(market, pool_id)
    assert (await end_of(customer, pool_id))[:10] == "2027-03-07"
    await market.wait_until(datetime.datetime(2027, 3, 7, 12, tzinfo=datetime.UTC))
    assert (await end_of(customer, pool_id))[:10] == "2027-04-07"
    await market.wait_until(datetime.datetime(2027, 4, 7, 12, tzinfo=datetime.UTC))
    assert (await end_of(customer, pool_id))[:10] == "2027-05-07"


@on_sqlite_only
async def test_a_month_on_its_way_is_charged_after_the_pause_and_begins_after_it(market: Market) -> None:
    pool_id = await market.live_pool()
    customer = await subscriber(market, pool_id)
    start = market.clock()
    market.gateway.down = True
    await market.wait_until(add_months(start, 1))
    await pause(market, pool_id)
    market.gateway.down = False
    taken = await market.taken()
    await market.wait(days=40)
    assert await market.taken() == taken
    await resume(market, pool_id)
    await market.wait(seconds=10)
    assert await end_of(customer, pool_id) == iso(add_months(add_months(start, 1) + 40 * DAY, 1))
    assert sorted(await market.taken()) == sorted([*taken, 2_700, 2_700])  # and the pool's first customer


@on_sqlite_only
async def test_a_first_month_on_its_way_is_charged_after_the_pause(market: Market) -> None:
    pool_id = await market.live_pool()
    customer = await market.customer()
    taken = await market.taken()
    market.gateway.down = True
    _ = (await customer.subscribe(pool_id)).error
    await market.wait(seconds=31)
    market.gateway.down = False
    await market.wait(seconds=6)
    market.gateway.down = True
    await market.settle()
    await pause(market, pool_id)
    market.gateway.down = False
    await market.wait(minutes=10)
    assert sorted(await market.taken()) in (sorted(taken), sorted([*taken, FEE_CENTS]))
    await resume(market, pool_id)
    for _ in range(3):
        await market.wait(seconds=31)
    assert await customer.status(pool_id) == "active"
    end = datetime.datetime.fromisoformat(await end_of(customer, pool_id))
    assert add_months(market.clock(), 1) - end <= datetime.timedelta(seconds=93)


@on_sqlite_only
async def test_dunning_waits_for_the_pause(market: Market) -> None:
    pool_id = await market.live_pool()
    customer = await subscriber(market, pool_id)
    start = market.clock()
    _ = (await customer.put_card(BAD_CARD)).data
    await market.wait_until(add_months(start, 1))
    assert await customer.status(pool_id) == "past_due"
    await market.wait(hours=12)
    await pause(market, pool_id)
    await market.wait(days=30)
    await resume(market, pool_id)
    tried = len(market.gateway.charges)
    await market.wait(hours=11)
    assert len(market.gateway.charges) == tried
    await market.wait(hours=1)
    assert len(market.gateway.charges) == tried + 1
    assert await customer.status(pool_id) == "past_due"
    _ = (await customer.put_card(GOOD_CARD)).data
    await market.settle()
    assert await end_of(customer, pool_id) > iso(add_months(start, 2) + 29 * DAY)


@on_sqlite_only
async def test_what_is_not_paid_can_be_ended_in_a_pause_and_what_is_paid_stays(market: Market) -> None:
    pool_id = await market.live_pool()
    paid, unpaid = await subscriber(market, pool_id), await subscriber(market, pool_id)
    start = market.clock()
    _ = (await unpaid.put_card(BAD_CARD)).data
    await market.wait_until(add_months(start, 1))
    await pause(market, pool_id)
    await market.wait(days=60)
    for customer, status in ((paid, "active"), (unpaid, "canceled")):
        pledge_id = (await customer.my_pledge(pool_id)).data["id"]
        assert (await customer.cancel(pledge_id)).data["status"] == status
    await resume(market, pool_id)
    await market.settle()
    assert await paid.status(pool_id) == "active"
    await market.wait(days=31)
    assert await paid.status(pool_id) == "none"


@on_sqlite_only
async def test_a_hold_ends_in_a_pause_too(market: Market) -> None:
    pool_id = await market.live_pool()
    customer = await market.customer()
    taken = await market.taken()
    market.gateway.mute = True
    _ = (await customer.subscribe(pool_id)).error
    await pause(market, pool_id)
    market.gateway.mute = False
    await market.wait(minutes=15)
    await market.wait(seconds=10)
    assert await market.taken() == taken
    assert await market.pledged_slots(pool_id) == 1
