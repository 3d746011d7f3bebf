"""What happens by itself: pools go live, months are charged, a cut-off step is finished by the next tick."""

from __future__ import annotations

import datetime
from typing import Any

import pytest

from contract.nodes import ServingState
from control_plane.clock import add_months, iso
from control_plane.pledges.lifecycle import Lifecycle
from tests.unit.control_plane.market import (
    BAD_CARD,
    FEE_CENTS,
    GOOD_CARD,
    Customer,
    Market,
    at_once,
    empty_ground,  # noqa: F401 - a fixture
    on_sqlite_only,
    open_market,  # noqa: F401 - a fixture
)

pytestmark = pytest.mark.slow

SECOND = datetime.timedelta(seconds=1)


async def pledgers(market: Market, pool_id: str, count: int) -> list[Customer]:
    """Customers with one pledged seat each."""
    made = [await market.customer() for _ in range(count)]
    for customer in made:
        assert (await customer.subscribe(pool_id)).data["status"] == "pledged"
    return made


# --- going live ------------------------------------------------------------------------------------


@on_sqlite_only
async def test_a_pool_below_its_threshold_goes_on_collecting(market: Market) -> None:
    pool_id = await market.pool(min_seats=3)
    await market.node(pool_id)
    await pledgers(market, pool_id, 2)
    await market.settle()
    assert await market.status(pool_id) == "funding"
    await pledgers(market, pool_id, 1)
    await market.settle()
    assert await market.status(pool_id) == "active"


@on_sqlite_only
async def test_the_threshold_counts_the_seats_of_every_block(market: Market) -> None:
    pool_id = await market.pool(min_seats=6)
    await market.node(pool_id)
    customer = await market.customer()
    _ = (await customer.subscribe(pool_id, "night", "europe", "americas", quantity=2)).data
    await market.settle()
    assert await market.status(pool_id) == "active"


async def test_nobody_is_charged_before_a_node_is_ready(market: Market) -> None:
    pool_id = await market.pool(min_seats=1)
    [customer] = await pledgers(market, pool_id, 1)
    await market.settle()
    assert await market.status(pool_id) == "activating"
    node_id = await market.node(pool_id, ready=False)
    for state in (ServingState.STARTING, ServingState.DRAINING, ServingState.FAILED, ServingState.STOPPED):
        await market.hear(node_id, state)
        await market.settle()
        assert await market.taken() == [FEE_CENTS]
    await market.hear(node_id)
    await market.wait(seconds=41)
    assert await market.taken() == [FEE_CENTS]
    await market.hear(node_id)
    await market.settle()
    assert await market.status(pool_id) == "active"
    assert await customer.status(pool_id) == "active"
    assert sorted(await market.taken()) == [FEE_CENTS, 2_700]


async def test_at_activation_everybody_is_charged_once_and_gets_a_key(market: Market) -> None:
    pool_id = await market.pool(min_seats=4)
    customers = await pledgers(market, pool_id, 4)
    await market.node(pool_id)
    await market.settle(5)
    keys = [(await customer.my_key(pool_id)).data["apiKey"] for customer in customers]
    assert len(set(keys)) == 4
    assert sorted(await market.taken()) == [FEE_CENTS] * 4 + [2_700] * 4
    end = iso(add_months(market.clock(), 1))
    for customer in customers:
        assert (await customer.my_pledge(pool_id)).data["currentPeriodEnd"] == end


@on_sqlite_only
async def test_declined_months_above_the_threshold_cost_only_those_their_pledge(market: Market) -> None:
    pool_id = await market.pool(min_seats=2)
    good, bad, other = [await market.customer() for _ in range(3)]
    for customer in (good, bad, other):
        _ = (await customer.subscribe(pool_id)).data
    _ = (await bad.put_card(BAD_CARD)).data
    await market.node(pool_id)
    await market.settle()
    assert await market.status(pool_id) == "active"
    assert [await each.status(pool_id) for each in (good, bad, other)] == ["active", "none", "active"]
    assert await market.pledged_slots(pool_id) == 2
    assert sorted(await market.taken()) == [FEE_CENTS] * 3 + [2_700] * 2


async def test_declined_months_below_the_threshold_return_the_others_theirs(market: Market) -> None:
    pool_id = await market.pool(min_seats=3)
    good, other, bad = customers = await pledgers(market, pool_id, 3)
    _ = (await bad.put_card(BAD_CARD)).data
    await market.node(pool_id)
    await market.settle()
    assert await market.status(pool_id) == "funding"
    assert [await each.status(pool_id) for each in customers] == ["pledged", "pledged", "none"]
    assert await market.pledged_slots(pool_id) == 2
    assert sorted(await market.taken()) == [FEE_CENTS] * 3
    assert (await good.my_key(pool_id)).refusal == (404, "key_not_found")
    assert (await other.withdraw(pool_id)).status == 200
    assert (await good.withdraw(pool_id)).status == 200


@on_sqlite_only
async def test_the_next_attempt_charges_anew(market: Market) -> None:
    pool_id = await market.pool(min_seats=2)
    first, bad = await pledgers(market, pool_id, 2)
    _ = (await bad.put_card(BAD_CARD)).data
    node_id = await market.node(pool_id)
    await market.settle()
    assert await market.status(pool_id) == "funding"
    await market.wait(hours=1)
    await market.hear(node_id)
    await pledgers(market, pool_id, 1)
    await market.settle()
    assert await market.status(pool_id) == "active"
    assert await first.status(pool_id) == "active"
    assert sorted(await market.taken()) == [FEE_CENTS] * 3 + [2_700] * 2


@on_sqlite_only
async def test_who_pledges_while_the_pool_goes_live_is_charged_with_the_others(market: Market) -> None:
    pool_id = await market.pool(min_seats=1)
    [first] = await pledgers(market, pool_id, 1)
    await market.settle()
    assert await market.status(pool_id) == "activating"
    [late] = await pledgers(market, pool_id, 1)
    await market.node(pool_id)
    market.gateway.down = True
    await market.settle()
    market.gateway.down = False
    later = await market.customer()
    assert (await later.subscribe(pool_id)).data["status"] == "pledged"
    await market.wait(seconds=5)
    assert await market.status(pool_id) == "active"
    assert [await each.status(pool_id) for each in (first, late, later)] == ["active"] * 3


@on_sqlite_only
async def test_a_pool_that_lost_its_pledges_before_it_charged_collects_again(market: Market) -> None:
    pool_id = await market.pool(min_seats=2)
    first, second = await pledgers(market, pool_id, 2)
    await market.settle()
    assert await market.status(pool_id) == "activating"
    assert (await second.withdraw(pool_id)).status == 200
    await market.settle()
    assert await market.status(pool_id) == "funding"
    assert await first.status(pool_id) == "pledged"


@on_sqlite_only
async def test_who_is_being_charged_cannot_withdraw(market: Market) -> None:
    pool_id = await market.pool(min_seats=1)
    [customer] = await pledgers(market, pool_id, 1)
    await market.node(pool_id)
    market.gateway.mute = True
    await market.settle()
    answer = await customer.withdraw(pool_id)
    assert answer.refusal == (409, "pool_activating")
    assert int(answer.headers["retry-after"]) > 0
    market.gateway.mute = False
    await market.wait(seconds=5)
    assert await customer.status(pool_id) == "active"


@on_sqlite_only
async def test_an_activation_goes_on_after_an_outage_where_it_was(market: Market) -> None:
    pool_id = await market.pool(min_seats=3)
    customers = await pledgers(market, pool_id, 3)
    await market.node(pool_id)
    charge, answered = market.gateway.charge, 0

    async def twice(*arguments: Any) -> Any:
        nonlocal answered
        answered += 1
        market.gateway.mute = answered > 1
        return await charge(*arguments)

    market.gateway.charge = twice  # type: ignore[assignment,method-assign]
    await market.settle()
    assert await market.status(pool_id) == "activating"
    market.gateway.charge, market.gateway.mute = charge, False  # type: ignore[method-assign]
    market.lifecycle = Lifecycle(market.context)
    await market.settle()
    assert [await each.status(pool_id) for each in customers] == ["active"] * 3
    assert sorted(await market.taken()) == [FEE_CENTS] * 3 + [2_700] * 3


@on_sqlite_only
async def test_a_gateway_that_is_away_is_left_alone_for_some_seconds(market: Market) -> None:
    pool_id = await market.pool(min_seats=1)
    await pledgers(market, pool_id, 1)
    await market.node(pool_id)
    asked = 0

    async def count(*arguments: Any) -> None:
        nonlocal asked
        asked += 1
        market.gateway.down = True
        market.gateway._arrive()

    market.gateway.charge = count  # type: ignore[assignment,method-assign]
    for _ in range(10):
        await market.wait(milliseconds=400)
    assert asked == 1
    await market.wait(seconds=2)
    assert asked == 2


async def test_a_charge_that_cannot_be_settled_keeps_no_other_from_it(
    market: Market, caplog: pytest.LogCaptureFixture
) -> None:
    pool_id = await market.live_pool()
    broken, sound = await market.customer(), await market.customer()
    for customer in (broken, sound):
        _ = (await customer.subscribe(pool_id)).data
    charge = market.gateway.charge
    _ = (await broken.put_card("pm_card_amex")).data

    async def fail(key: str, token: str, *arguments: Any) -> Any:
        if token == "pm_card_amex":
            raise RuntimeError("a bug of the gateway's")
        return await charge(key, token, *arguments)

    market.gateway.charge = fail  # type: ignore[method-assign,assignment]
    start = market.clock()
    await market.wait_until(add_months(start, 1))
    assert "could not be settled" in caplog.text
    assert (await sound.my_pledge(pool_id)).data["currentPeriodEnd"] == iso(add_months(start, 2))
    assert (await broken.my_pledge(pool_id)).data["currentPeriodEnd"] == iso(add_months(start, 1))
    market.gateway.charge = charge  # type: ignore[method-assign]
    await market.wait(minutes=1)
    assert (await broken.my_pledge(pool_id)).data["currentPeriodEnd"] == iso(add_months(start, 2))


async def test_two_lifecycles_at_once_do_everything_once(market: Market) -> None:
    pool_id = await market.pool(min_seats=4)
    customers = await pledgers(market, pool_id, 4)
    _ = (await customers[0].put_card(BAD_CARD)).data
    await market.node(pool_id)
    others = [Lifecycle(market.context) for _ in range(3)]
    for _ in range(3):
        await at_once(*[each.tick() for each in others])
    assert await market.status(pool_id) == "funding"
    assert sorted(await market.taken()) == [FEE_CENTS] * 4
    await pledgers(market, pool_id, 1)
    for _ in range(3):
        await at_once(*[each.tick() for each in others])
    assert await market.status(pool_id) == "active"
    assert sorted(await market.taken()) == [FEE_CENTS] * 5 + [2_700] * 4
    market.clock.now = add_months(market.clock(), 1)
    await at_once(*[each.tick() for each in others])
    assert sorted(await market.taken()) == [FEE_CENTS] * 5 + [2_700] * 8


# --- every month -----------------------------------------------------------------------------------


async def test_months_begin_on_the_day_of_the_first_one(market: Market) -> None:
    market.clock.now = start = datetime.datetime(2026, 1, 31, 18, 30, tzinfo=datetime.UTC)
    pool_id = await market.live_pool()
    customer = await market.customer()
    _ = (await customer.subscribe(pool_id)).data
    key = (await customer.my_key(pool_id)).data
    ends = []
    for month in range(1, 6):
        end = (await customer.my_pledge(pool_id)).data["currentPeriodEnd"]
        ends.append(end[5:10])
        await market.wait_until(add_months(start, month) - SECOND)
        assert (await customer.my_pledge(pool_id)).data["currentPeriodEnd"] == end
        await market.wait(seconds=1)
        assert (await customer.my_key(pool_id)).data == key
    assert ends == ["02-28", "03-31", "04-30", "05-31", "06-30"]
    assert (await market.taken()).count(2_700) == 2 * 6


@on_sqlite_only
async def test_a_month_that_was_declined_begins_when_it_was_due(market: Market) -> None:
    pool_id = await market.live_pool()
    customer = await market.customer()
    start = market.clock()
    _ = (await customer.subscribe(pool_id)).data
    _ = (await customer.put_card(BAD_CARD)).data
    await market.wait_until(add_months(start, 1))
    await market.wait(days=3)
    _ = (await customer.put_card(GOOD_CARD)).data
    await market.settle()
    assert (await customer.my_pledge(pool_id)).data["currentPeriodEnd"] == iso(add_months(start, 2))


@on_sqlite_only
async def test_a_month_in_which_we_were_away_begins_when_we_are_back(market: Market) -> None:
    pool_id = await market.live_pool()
    customer = await market.customer()
    start = market.clock()
    _ = (await customer.subscribe(pool_id)).data
    before = await market.taken()
    market.clock.now = back = add_months(start, 3) + datetime.timedelta(days=5)
    await market.settle()
    assert (await customer.my_pledge(pool_id)).data["currentPeriodEnd"] == iso(add_months(back, 1))
    assert sorted(await market.taken()) == sorted([*before, 2_700, 2_700])


@on_sqlite_only
async def test_within_the_time_that_nodes_honour_keys_a_month_begins_when_it_was_due(market: Market) -> None:
    pool_id = await market.live_pool()
    customer = await market.customer()
    start = market.clock()
    _ = (await customer.subscribe(pool_id)).data
    market.clock.now = add_months(start, 1) + datetime.timedelta(hours=72)
    await market.settle()
    assert (await customer.my_pledge(pool_id)).data["currentPeriodEnd"] == iso(add_months(start, 2))


@on_sqlite_only
async def test_every_turn_of_a_subscription_raises_the_revision(market: Market) -> None:
    """Or its node would not fetch what changed."""
    pool_id = await market.live_pool()
    revisions = [await market.revision(pool_id)]
    customer = await market.customer()
    market.clock.advance(3600)
    await market.hear_all()
    pledge_id = (await customer.subscribe(pool_id)).data["id"]
    start = market.clock()

    async def raised() -> bool:
        revisions.append(await market.revision(pool_id))
        return revisions[-1] > revisions[-2]

    assert await raised(), "activated"
    await market.wait_until(add_months(start, 1) - SECOND)
    assert await raised(), "the pool's first pledge was renewed"
    await market.wait(seconds=1)
    assert await raised(), "renewed"
    _ = (await customer.put_card(BAD_CARD)).data
    await market.wait_until(add_months(start, 2) - SECOND)
    assert await raised(), "the pool's first pledge was renewed"
    await market.wait(seconds=1)
    assert await raised(), "past due"
    _ = (await customer.put_card(GOOD_CARD)).data
    await market.settle()
    assert await raised(), "paid"
    _ = (await customer.cancel(pledge_id)).data
    await market.wait_until(add_months(start, 3) - SECOND)
    assert await raised(), "the pool's first pledge was renewed"
    await market.wait(seconds=1)
    assert await raised(), "ended"
    _ = (await market.operate("POST", f"/pools/{pool_id}/pause")).data
    assert await raised(), "paused"
    _ = (await market.operate("POST", f"/pools/{pool_id}/resume")).data
    assert await raised(), "resumed"


# --- nodes -----------------------------------------------------------------------------------------


@on_sqlite_only
async def test_a_pledge_that_was_paid_without_a_node_gets_one_later(market: Market) -> None:
    pool_id = await market.pool(min_seats=1)
    node_id = await market.node(pool_id)
    [first] = await pledgers(market, pool_id, 1)
    await market.settle()
    second = await market.customer()
    charge = market.gateway.charge

    async def drain_then_charge(*arguments: Any) -> Any:
        _ = (await market.operate("POST", f"/nodes/{node_id}/drain")).data
        return await charge(*arguments)

    market.gateway.charge = drain_then_charge  # type: ignore[method-assign,assignment]
    assert (await second.subscribe(pool_id)).data["key"]["baseUrl"] is None
    market.gateway.charge = charge  # type: ignore[method-assign]
    before = await market.revision(pool_id)
    other = await market.node(pool_id)
    await market.settle()
    assert (await second.my_key(pool_id)).data["baseUrl"] == f"http://{other}:8001"
    assert (await first.my_key(pool_id)).data["baseUrl"] == f"http://{node_id}:8001"
    assert await market.revision(pool_id) > before


async def test_the_pledges_of_a_retired_node_move_with_their_keys(market: Market) -> None:
    pool_id = await market.pool(min_seats=2)
    old = await market.node(pool_id)
    customers = await pledgers(market, pool_id, 2)
    await market.settle()
    keys = [(await each.my_key(pool_id)).data for each in customers]
    assert {key["baseUrl"] for key in keys} == {f"http://{old}:8001"}
    _ = (await market.operate("POST", f"/nodes/{old}/retire")).data
    await market.settle()
    assert [(await each.my_key(pool_id)).data for each in customers] == [
        {**key, "baseUrl": None} for key in keys
    ]
    new = await market.node(pool_id)
    await market.settle()
    assert [(await each.my_key(pool_id)).data for each in customers] == [
        {**key, "baseUrl": f"http://{new}:8001"} for key in keys
    ]
