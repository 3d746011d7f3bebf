"""Reserving seats: all of an order or nothing, paid or released, one pledge for each account and pool."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import update

from contract.keys import KeyKind, is_key
from control_plane.clock import add_months, iso
from control_plane.nodes.tables import Node
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

pytestmark = pytest.mark.slow

KEY = {"id", "apiKey", "rpmLimit", "tpmLimit", "isActive", "baseUrl"}
BLOCKS = {"night": (3, "27.00"), "europe": (2, "10.01"), "americas": (1, "0.99")}


# --- answers ---------------------------------------------------------------------------------------


@on_sqlite_only
async def test_a_pledge_in_a_pool_that_is_not_live_has_no_key(market: Market) -> None:
    pool_id = await market.pool(slug="pool", blocks=BLOCKS, min_seats=6)
    customer = await market.customer()
    reserved = (await customer.subscribe("pool", "europe", "night", quantity=2)).data
    assert reserved == {
        "id": reserved["id"],
        "poolId": pool_id,
        "status": "pledged",
        "monthlyPrice": "74.02",
        "slotCount": 32,
    }
    pledge = (await customer.my_pledge(pool_id)).data
    assert set(pledge) == {"id", "status", "monthlyPrice", "currentPeriodEnd", "hours", "key"}
    assert pledge["id"] == reserved["id"]
    assert (pledge["status"], pledge["monthlyPrice"]) == ("pledged", "74.02")
    assert pledge["currentPeriodEnd"] is None
    assert pledge["key"] is None
    assert all(set(hour) == {"hour", "slotIndex", "pricePerDay"} for hour in pledge["hours"])
    assert [(hour["hour"], hour["slotIndex"]) for hour in pledge["hours"]] == [
        (hour, slot) for first in (0, 8) for slot in (0, 1) for hour in range(first, first + 8)
    ]
    assert sum(int(hour["pricePerDay"].replace(".", "")) for hour in pledge["hours"]) == 7402
    assert (await customer.my_key("pool")).refusal == (404, "key_not_found")
    assert await market.taken() == [FEE_CENTS]


async def test_a_pledge_in_a_live_pool_is_active_with_its_key_at_once(market: Market) -> None:
    pool_id = await market.live_pool()
    market.clock.advance(1)
    customer = await market.customer()
    reserved = (await customer.subscribe(pool_id, "night", "americas", quantity=3)).data
    assert set(reserved) == {"id", "poolId", "status", "monthlyPrice", "slotCount", "key"}
    assert (reserved["status"], reserved["monthlyPrice"], reserved["slotCount"]) == ("active", "162.00", 48)
    key = reserved["key"]
    assert set(key) == KEY
    assert is_key(key["apiKey"], KeyKind.BOOST)
    assert (key["rpmLimit"], key["tpmLimit"], key["isActive"]) == (180, 300_000, True)
    assert key["baseUrl"].startswith("http://")
    pledge = (await customer.my_pledge(pool_id)).data
    assert pledge["key"] == key == (await customer.my_key(pool_id)).data
    assert pledge["currentPeriodEnd"] == iso(add_months(market.clock(), 1))
    assert (await market.taken())[-2:] == [FEE_CENTS, 16_200]


@on_sqlite_only
async def test_a_key_is_shown_alike_everywhere_also_before_its_node_has_an_address(market: Market) -> None:
    pool_id = await market.pool(min_seats=1)
    customer = await market.customer()
    _ = (await customer.subscribe(pool_id)).data
    node_id = await market.node(pool_id)
    await market.settle()
    async with market.database.write() as session:
        await session.execute(update(Node).where(Node.id == node_id).values(base_url=None))
    other = await market.customer()
    key = (await other.subscribe(pool_id)).data["key"]
    assert set(key) == KEY
    assert key["baseUrl"] is None
    assert key == (await other.my_key(pool_id)).data


@on_sqlite_only
async def test_what_is_no_order_is_refused(market: Market) -> None:
    pool_id = await market.pool()
    customer = await market.customer()
    bodies: list[Any] = [
        {},
        {"blocks": []},
        {"blocks": "night"},
        {"blocks": ["noon"]},
        {"blocks": ["night", "night"]},
        {"blocks": ["night", "europe", "americas", "night"]},
        {"blocks": ["Night"]},
        {"blocks": [None]},
        {"blocks": None},
        {"blocks": ["night"], "seats": 1},
    ]
    quantities: list[Any] = [0, -1, 21, 1.5, 1.0, "1", True, None, [], 10**30]
    bodies += [{"blocks": ["night"], "quantity": quantity} for quantity in quantities]
    for body in bodies:
        answer = await customer.call("POST", f"/api/pools/{pool_id}/subscribe", body)
        assert answer.refusal == (422, "invalid_request"), body
        assert answer.error["details"]
    assert await market.rows("SELECT * FROM pledges") == []
    assert await market.taken() == []


@on_sqlite_only
async def test_one_to_twenty_seats_of_a_block_can_be_ordered(market: Market) -> None:
    pool_id = await market.pool(blocks={"night": (40, 1)})
    for quantity in (1, 20):
        customer = await market.customer()
        answer = await customer.subscribe(pool_id, quantity=quantity)
        assert answer.data["slotCount"] == 8 * quantity
    assert await market.pledged_slots(pool_id) == 21


async def test_the_dearest_order_of_the_dearest_pool_can_be_paid(market: Market) -> None:
    blocks = ("night", "europe", "americas")
    pool_id = await market.pool(blocks=dict.fromkeys(blocks, (20, 1_000_000)), min_seats=60)
    await market.node(pool_id)
    customer = await market.customer()
    reserved = (await customer.subscribe(pool_id, *blocks, quantity=20)).data
    assert reserved["monthlyPrice"] == "60000000.00"
    await market.settle()
    assert await customer.status(pool_id) == "active"
    assert await market.taken() == [FEE_CENTS, 6_000_000_000]


# --- refusals --------------------------------------------------------------------------------------


@on_sqlite_only
async def test_a_block_that_the_pool_does_not_have_is_named(market: Market) -> None:
    pool_id = await market.pool(blocks={"night": (3, 1)})
    customer = await market.customer()
    answer = await customer.subscribe(pool_id, "night", "europe")
    assert answer.refusal == (422, "block_not_offered")
    assert "europe" in answer.error["message"]


@on_sqlite_only
async def test_without_a_card_nothing_is_reserved(market: Market) -> None:
    pool_id = await market.pool()
    customer = await market.customer(card=None)
    assert (await customer.subscribe(pool_id)).refusal == (402, "payment_method_required")
    assert await market.pledged_slots(pool_id) == 0
    _ = (await customer.put_card(GOOD_CARD)).data
    assert (await customer.subscribe(pool_id)).data["status"] == "pledged"


@pytest.mark.parametrize("live", [False, True], ids=["funding", "live"])
async def test_a_declined_card_leaves_nothing_reserved_and_nothing_charged(
    market: Market, live: bool
) -> None:
    pool_id = await market.live_pool() if live else await market.pool()
    before = await market.pledged_slots(pool_id), await market.taken()
    customer = await market.customer(card="pm_card_chargeDeclinedInsufficientFunds")
    for _ in range(2):
        answer = await customer.subscribe(pool_id, quantity=2)
        assert answer.refusal == (402, "card_declined")
        assert answer.error["details"] == {"declineCode": "insufficient_funds"}
        assert await customer.status(pool_id) == "none"
    await market.settle()
    assert (await market.pledged_slots(pool_id), await market.taken()) == before
    _ = (await customer.put_card(GOOD_CARD)).data
    assert (await customer.subscribe(pool_id, quantity=2)).status == 200


async def test_a_fee_whose_month_is_declined_is_given_back(market: Market) -> None:
    """In a live pool the reservation comes about with the month, not with the fee."""
    pool_id = await market.live_pool()
    before = await market.taken()
    customer = await market.customer()
    charge = market.gateway.charge

    async def then_another_card(*arguments: Any) -> Any:
        outcome = await charge(*arguments)
        _ = (await customer.put_card(BAD_CARD)).data
        return outcome

    market.gateway.charge = then_another_card  # type: ignore[assignment,method-assign]
    assert (await customer.subscribe(pool_id)).refusal == (402, "card_declined")
    await market.settle()
    assert await market.taken() == before
    assert await market.pledged_slots(pool_id) == 1


async def test_sold_out_names_the_blocks_and_reserves_no_part(market: Market) -> None:
    pool_id = await market.pool(blocks=BLOCKS, min_seats=6)
    first, second = await market.customer(), await market.customer()
    _ = (await first.subscribe(pool_id, "europe", "night")).data
    answer = await second.subscribe(pool_id, "night", "europe", "americas", quantity=2)
    assert answer.refusal == (409, "sold_out")
    assert answer.error["details"] == {
        "blocks": [
            {"block": "europe", "requested": 2, "available": 1},
            {"block": "americas", "requested": 2, "available": 0 + 1},
        ]
    }
    assert await market.pledged_slots(pool_id) == 2
    assert await second.status(pool_id) == "none"
    assert (await second.subscribe(pool_id, "night", quantity=2)).status == 200
    assert await market.taken() == [FEE_CENTS, FEE_CENTS]


async def test_an_account_has_one_pledge_in_a_pool_and_may_have_one_in_another(market: Market) -> None:
    pool_id, other = await market.pool(), await market.pool()
    customer = await market.customer()
    _ = (await customer.subscribe(pool_id)).data
    assert (await customer.subscribe(pool_id, "europe")).refusal == (409, "pledge_exists")
    assert (await customer.subscribe(other)).status == 200
    _ = (await customer.withdraw(pool_id)).data
    assert (await customer.subscribe(pool_id, "europe")).status == 200


@on_sqlite_only
async def test_a_paused_pool_sells_nothing(market: Market) -> None:
    pool_id = await market.live_pool()
    customer = await market.customer()
    _ = (await market.operate("POST", f"/pools/{pool_id}/pause")).data
    assert (await customer.subscribe(pool_id)).refusal == (409, "pool_paused")
    _ = (await market.operate("POST", f"/pools/{pool_id}/resume")).data
    assert (await customer.subscribe(pool_id)).data["status"] == "active"


# --- whose pledge ----------------------------------------------------------------------------------


async def test_nobody_sees_a_pledge_but_its_owner(market: Market) -> None:
    pool_id = await market.live_pool()
    owner, stranger = await market.customer(), await market.customer()
    pledge_id = (await owner.subscribe(pool_id)).data["id"]
    gone = (404, "pledge_not_found")
    assert (await stranger.my_pledge(pool_id)).refusal == gone
    assert (await stranger.my_key(pool_id)).refusal == gone
    assert (await stranger.withdraw(pool_id)).refusal == gone
    assert (await stranger.cancel(pledge_id)).refusal == gone
    assert (await stranger.resume(pledge_id)).refusal == gone
    assert (await stranger.call("GET", f"/api/pools/{pool_id}/my-throughput")).refusal == gone
    assert (await stranger.portal()).data == {"poolPledges": []}
    operator = market.operator_key
    assert (await market.call("GET", f"/api/pools/{pool_id}/my-pledge", key=operator)).refusal == gone
    assert await owner.status(pool_id) == "active"


# --- taking it back --------------------------------------------------------------------------------


@on_sqlite_only
async def test_a_withdrawn_pledge_frees_its_seats_and_keeps_its_fee(market: Market) -> None:
    pool_id = await market.pool(blocks={"night": (2, 1)}, min_seats=2)
    customer = await market.customer()
    _ = (await customer.subscribe(pool_id)).data
    assert (await customer.withdraw(pool_id)).data == {"canceled": True}
    for answer in (
        await customer.withdraw(pool_id),
        await customer.my_pledge(pool_id),
        await customer.my_key(pool_id),
    ):
        assert answer.refusal == (404, "pledge_not_found")
    assert await market.pledged_slots(pool_id) == 0
    await market.settle()
    assert await market.taken() == [FEE_CENTS]
    assert (await (await market.customer()).subscribe(pool_id, quantity=2)).status == 200


@on_sqlite_only
async def test_a_running_subscription_is_sent_to_the_portal(market: Market) -> None:
    pool_id = await market.live_pool()
    customer = await market.customer()
    _ = (await customer.subscribe(pool_id)).data
    answer = await customer.withdraw(pool_id)
    assert answer.refusal == (409, "use_billing_portal")
    url = answer.error["details"]["portalUrl"]
    assert url == "http://control-plane.test/api/billing/portal"
    assert (await customer.call("GET", url)).status == 200
    _ = (await customer.put_card(BAD_CARD)).data
    await market.wait(days=32)
    assert await customer.status(pool_id) == "past_due"
    assert (await customer.withdraw(pool_id)).refusal == (409, "use_billing_portal")


# --- when the gateway is away ----------------------------------------------------------------------


@on_sqlite_only
@pytest.mark.parametrize("mute", [False, True], ids=["no call arrives", "no answer comes"])
@pytest.mark.parametrize("live", [False, True], ids=["funding", "live"])
async def test_a_hold_is_confirmed_when_the_gateway_is_back(market: Market, live: bool, mute: bool) -> None:
    pool_id = await market.live_pool() if live else await market.pool()
    before = await market.taken()
    customer = await market.customer()
    market.gateway.down, market.gateway.mute = not mute, mute
    answer = await customer.subscribe(pool_id)
    assert answer.refusal == (503, "payment_unavailable")
    assert int(answer.headers["retry-after"]) > 0
    assert await market.pledged_slots(pool_id) == live + 1
    assert await customer.status(pool_id) == "none"
    assert (await customer.subscribe(pool_id)).refusal == (409, "payment_pending")
    await market.wait(seconds=31)
    market.gateway.down = market.gateway.mute = False
    await market.wait(seconds=31)
    await market.wait(seconds=31)
    assert await customer.status(pool_id) == ("active" if live else "pledged")
    charged = [FEE_CENTS, 2_700] if live else [FEE_CENTS]
    assert sorted(await market.taken()) == sorted(before + charged)


@pytest.mark.parametrize("mute", [False, True], ids=["no call arrives", "no answer comes"])
async def test_a_hold_ends_after_a_quarter_of_an_hour_and_costs_nothing(market: Market, mute: bool) -> None:
    pool_id = await market.pool()
    customer = await market.customer()
    market.gateway.down, market.gateway.mute = not mute, mute
    _ = (await customer.subscribe(pool_id)).error
    await market.wait(minutes=14, seconds=59)
    assert await market.pledged_slots(pool_id) == 1
    await market.wait(seconds=1)
    assert await market.pledged_slots(pool_id) == 0
    market.gateway.down = market.gateway.mute = False
    await market.wait(seconds=10)
    assert await market.taken() == []
    assert await market.rows("SELECT state FROM charges") == [("refunded",)]
    assert (await customer.subscribe(pool_id)).status == 200


@on_sqlite_only
async def test_a_hold_whose_month_is_not_paid_in_time_gives_its_fee_back(market: Market) -> None:
    pool_id = await market.live_pool()
    before = await market.taken()
    customer = await market.customer()
    charge = market.gateway.charge

    async def then_silence(*arguments: Any) -> Any:
        outcome = await charge(*arguments)
        market.gateway.down = True
        return outcome

    market.gateway.charge = then_silence  # type: ignore[assignment,method-assign]
    assert (await customer.subscribe(pool_id)).refusal == (503, "payment_unavailable")
    assert sorted(await market.taken()) == sorted([*before, FEE_CENTS])
    await market.wait(minutes=15)
    assert await market.pledged_slots(pool_id) == 1
    market.gateway.down = False
    await market.wait(seconds=10)
    assert await market.taken() == before
    assert await customer.status(pool_id) == "none"


@on_sqlite_only
async def test_a_hold_can_be_given_up(market: Market) -> None:
    pool_id = await market.pool()
    customer = await market.customer()
    market.gateway.mute = True
    _ = (await customer.subscribe(pool_id)).error
    assert (await customer.withdraw(pool_id)).data == {"canceled": True}
    assert await market.pledged_slots(pool_id) == 0
    market.gateway.mute = False
    await market.wait(seconds=10)
    assert await market.taken() == []


# --- at once ---------------------------------------------------------------------------------------


async def test_the_last_seats_are_sold_once(market: Market) -> None:
    pool_id = await market.pool(blocks={"night": (4, 1), "europe": (4, 1)}, min_seats=8)
    customers = [await market.customer() for _ in range(10)]
    orders = [("night", "europe"), ("europe", "night")]
    answers = await at_once(
        *[customer.subscribe(pool_id, *orders[i % 2]) for i, customer in enumerate(customers)]
    )
    assert sorted(answer.status for answer in answers) == [200] * 4 + [409] * 6
    assert {answer.refusal for answer in answers if answer.status != 200} == {(409, "sold_out")}
    assert await market.pledged_slots(pool_id) == 8
    assert await market.taken() == [FEE_CENTS] * 4


async def test_an_account_that_subscribes_many_times_at_once_has_one_pledge(market: Market) -> None:
    pool_id = await market.pool()
    customer = await market.customer()
    answers = await at_once(*[customer.subscribe(pool_id) for _ in range(8)])
    assert sorted(answer.status for answer in answers) == [200] + [409] * 7
    codes = {answer.refusal[1] for answer in answers if answer.status != 200}
    assert codes <= {"pledge_exists", "payment_pending"}
    assert await market.pledged_slots(pool_id) == 1
    assert await market.taken() == [FEE_CENTS]


async def test_subscribing_and_withdrawing_at_once_ends_in_one_or_the_other(market: Market) -> None:
    pool_id = await market.pool()
    for _ in range(5):
        customer = await market.customer()

        async def withdraw(customer: Customer = customer) -> Answer:
            for _ in range(50):
                answer = await customer.withdraw(pool_id)
                if answer.status == 200:
                    break
            return answer

        answer, gone = await at_once(customer.subscribe(pool_id), withdraw())
        withdrawn = gone.status == 200
        if answer.status == 200:
            assert await customer.status(pool_id) == ("none" if withdrawn else "pledged")
        else:
            assert answer.refusal == (409, "pledge_ended")
            assert withdrawn
        await customer.withdraw(pool_id)
    await market.settle()
    assert await market.pledged_slots(pool_id) == 0
