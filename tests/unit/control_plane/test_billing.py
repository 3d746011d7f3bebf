"""Cards on file, the portal, and months that are paid late or not at all."""

from __future__ import annotations

import datetime

from control_plane.clock import add_months, iso
from tests.unit.control_plane.market import (
    BAD_CARD,
    GOOD_CARD,
    Customer,
    Market,
    at_once,
    empty_ground,  # noqa: F401 - a fixture
    on_sqlite_only,
    open_market,  # noqa: F401 - a fixture
)

DAY = datetime.timedelta(days=1)
PLEDGE = {
    "id",
    "poolId",
    "poolSlug",
    "status",
    "monthlyPrice",
    "currentPeriodEnd",
    "cancelAtPeriodEnd",
    "hasKey",
    "cancelUrl",
    "resumeUrl",
}


async def subscriber(market: Market, pool_id: str) -> tuple[Customer, str]:
    """With an active pledge."""
    market.clock.advance(1)
    customer = await market.customer()
    reserved = (await customer.subscribe(pool_id, "europe")).data
    assert reserved["status"] == "active"
    return customer, reserved["id"]


# --- cards -----------------------------------------------------------------------------------------


@on_sqlite_only
async def test_a_card_is_shown_by_its_brand_and_last_digits(market: Market) -> None:
    customer = await market.customer(card=None)
    for token, brand, last4 in (
        ("pm_card_visa", "visa", "4242"),
        ("pm_card_mastercard", "mastercard", "4444"),
        ("pm_card_amex", "amex", "8431"),
        ("pm_card_chargeDeclined", "visa", "0002"),
    ):
        assert (await customer.put_card(token)).data == {"brand": brand, "last4": last4}


@on_sqlite_only
async def test_a_payment_method_that_nobody_knows_is_refused(market: Market) -> None:
    customer = await market.customer()
    for token in ("4242424242424242", "pm_card", "PM_CARD_VISA", " pm_card_visa"):
        assert (await customer.put_card(token)).refusal == (422, "unknown_payment_method")
    for token in ("", "x" * 201, "\x00"):
        assert (await customer.put_card(token)).refusal == (422, "invalid_request")
    assert await market.rows("SELECT token FROM payment_methods") == [(GOOD_CARD,)]


@on_sqlite_only
async def test_each_decline_has_its_reason(market: Market) -> None:
    pool_id = await market.pool()
    for token, code in (
        ("pm_card_chargeDeclined", "generic_decline"),
        ("pm_card_chargeDeclinedInsufficientFunds", "insufficient_funds"),
        ("pm_card_visa_chargeDeclinedLostCard", "lost_card"),
        ("pm_card_chargeDeclinedExpiredCard", "expired_card"),
        ("pm_card_chargeDeclinedProcessingError", "processing_error"),
        ("pm_card_authenticationRequired", "authentication_required"),
    ):
        customer = await market.customer(card=token)
        answer = await customer.subscribe(pool_id)
        assert answer.error["details"] == {"declineCode": code}


@on_sqlite_only
async def test_a_card_cannot_be_put_on_file_while_the_gateway_is_away(market: Market) -> None:
    customer = await market.customer()
    market.gateway.down = True
    answer = await customer.put_card(BAD_CARD)
    assert answer.refusal == (503, "payment_unavailable")
    assert answer.headers["retry-after"] == "60"
    assert await market.rows("SELECT token FROM payment_methods") == [(GOOD_CARD,)]


async def test_cards_put_on_file_at_once_leave_one(market: Market) -> None:
    customer = await market.customer(card=None)
    cards = [GOOD_CARD, BAD_CARD, "pm_card_amex", "pm_card_jcb"]
    answers = await at_once(*[customer.put_card(card) for card in cards])
    assert [answer.status for answer in answers] == [200] * 4
    [(token,)] = await market.rows("SELECT token FROM payment_methods")
    assert token in cards


@on_sqlite_only
async def test_a_month_is_charged_to_the_card_that_is_on_file_then(market: Market) -> None:
    pool_id = await market.pool(min_seats=1)
    customer = await market.customer()
    _ = (await customer.subscribe(pool_id)).data
    _ = (await customer.put_card("pm_card_amex")).data
    await market.node(pool_id)
    await market.settle()
    assert await customer.status(pool_id) == "active"
    assert [card for _, card, _ in market.gateway.charges] == [GOOD_CARD, "pm_card_amex"]


# --- the portal ------------------------------------------------------------------------------------


async def test_the_portal_shows_every_pledge_that_has_not_ended(market: Market) -> None:
    live, funding, left = await market.live_pool(slug="live"), await market.pool(), await market.pool()
    customer, pledge_id = await subscriber(market, live)
    market.clock.advance(1)
    _ = (await customer.subscribe(funding, quantity=2)).data
    _ = (await customer.subscribe(left)).data
    _ = (await customer.withdraw(left)).data
    active, pledged = (await customer.portal()).data["poolPledges"]
    url = f"http://control-plane.test/api/billing/pledges/{pledge_id}"
    assert active == {
        "id": pledge_id,
        "poolId": live,
        "poolSlug": "live",
        "status": "active",
        "monthlyPrice": "27.00",
        "currentPeriodEnd": active["currentPeriodEnd"],
        "cancelAtPeriodEnd": False,
        "hasKey": True,
        "cancelUrl": f"{url}/cancel",
        "resumeUrl": f"{url}/resume",
    }
    assert set(pledged) == PLEDGE
    assert (pledged["status"], pledged["hasKey"], pledged["monthlyPrice"]) == ("pledged", False, "54.00")
    assert pledged["cancelUrl"] is pledged["resumeUrl"] is pledged["currentPeriodEnd"] is None
    assert (await customer.call("POST", active["cancelUrl"])).data["cancelAtPeriodEnd"] is True


async def test_a_canceled_subscription_works_until_its_paid_month_is_over(market: Market) -> None:
    pool_id = await market.live_pool()
    customer, pledge_id = await subscriber(market, pool_id)
    start, before = market.clock(), await market.taken()
    key = (await customer.my_key(pool_id)).data
    canceled = (await customer.cancel(pledge_id)).data
    assert set(canceled) == PLEDGE
    assert (canceled["status"], canceled["cancelAtPeriodEnd"]) == ("active", True)
    assert (await customer.cancel(pledge_id)).data == canceled
    await market.wait_until(add_months(start, 1) - datetime.timedelta(seconds=1))
    assert (await customer.my_key(pool_id)).data == key
    await market.wait(seconds=1)
    assert await customer.status(pool_id) == "none"
    assert (await customer.portal()).data == {"poolPledges": []}
    assert (await customer.resume(pledge_id)).refusal == (404, "pledge_not_found")
    assert before.count(2_700) == 2
    await market.hear_all()
    assert (await customer.subscribe(pool_id, quantity=9)).status == 200


@on_sqlite_only
async def test_a_cancellation_can_be_taken_back(market: Market) -> None:
    pool_id = await market.live_pool()
    customer, pledge_id = await subscriber(market, pool_id)
    start = market.clock()
    _ = (await customer.cancel(pledge_id)).data
    assert (await customer.resume(pledge_id)).data["cancelAtPeriodEnd"] is False
    await market.wait_until(add_months(start, 1))
    assert (await customer.my_pledge(pool_id)).data["currentPeriodEnd"] == iso(add_months(start, 2))


@on_sqlite_only
async def test_only_a_running_subscription_can_be_canceled_here(market: Market) -> None:
    pool_id = await market.pool()
    customer = await market.customer()
    pledge_id = (await customer.subscribe(pool_id)).data["id"]
    for reference in (pledge_id, "none", pool_id):
        assert (await customer.cancel(reference)).refusal == (404, "pledge_not_found")
        assert (await customer.resume(reference)).refusal == (404, "pledge_not_found")
    assert (await customer.cancel("%00")).refusal == (422, "invalid_request")
    assert await customer.status(pool_id) == "pledged"


@on_sqlite_only
async def test_canceling_after_the_month_is_over_buys_no_other(market: Market) -> None:
    """The next month is on its way to a gateway that does not answer."""
    pool_id = await market.live_pool()
    customer, pledge_id = await subscriber(market, pool_id)
    before = await market.taken()
    market.gateway.mute = True
    await market.wait(days=31)
    assert (await customer.cancel(pledge_id)).data["status"] == "canceled"
    assert await customer.status(pool_id) == "none"
    market.gateway.mute = False
    await market.wait(seconds=10)
    assert sorted(await market.taken()) == sorted([*before, 2_700])  # the pool's first customer's month


# --- months that are not paid ----------------------------------------------------------------------


@on_sqlite_only
async def test_a_declined_month_suspends_the_key_and_a_paid_one_brings_the_same_back(market: Market) -> None:
    pool_id = await market.live_pool()
    customer, _ = await subscriber(market, pool_id)
    start = market.clock()
    key = (await customer.my_key(pool_id)).data
    _ = (await customer.put_card(BAD_CARD)).data
    await market.wait_until(add_months(start, 1))
    assert await customer.status(pool_id) == "past_due"
    assert (await customer.my_key(pool_id)).data == {**key, "isActive": False}
    assert (await customer.my_pledge(pool_id)).data["currentPeriodEnd"] == iso(add_months(start, 1))
    await market.wait(hours=5)
    _ = (await customer.put_card(GOOD_CARD)).data
    await market.settle()
    assert await customer.status(pool_id) == "active"
    assert (await customer.my_key(pool_id)).data == key
    assert (await customer.my_pledge(pool_id)).data["currentPeriodEnd"] == iso(add_months(start, 2))


async def test_a_declined_month_is_tried_again_after_1_3_and_5_days_and_then_the_pledge_ends(
    market: Market,
) -> None:
    pool_id = await market.live_pool()
    customer, _ = await subscriber(market, pool_id)
    seats = await market.pledged_slots(pool_id)
    _ = (await customer.put_card(BAD_CARD)).data
    await market.wait_until(add_months(market.clock(), 1))
    for days in (1, 3, 5):
        tried = len(market.gateway.charges)
        await market.wait(days=days, seconds=-1)
        assert len(market.gateway.charges) == tried
        assert await customer.status(pool_id) == "past_due"
        await market.wait(seconds=1)
        assert len(market.gateway.charges) == tried + 1
    assert await customer.status(pool_id) == "none"
    assert await market.pledged_slots(pool_id) == seats - 1
    reason = "SELECT ended_because FROM pledges WHERE account_id = :account"
    assert await market.rows(reason, account=customer.id) == [("unpaid",)]


@on_sqlite_only
async def test_putting_cards_on_file_does_not_use_up_the_tries(market: Market) -> None:
    pool_id = await market.live_pool()
    customer, _ = await subscriber(market, pool_id)
    start = market.clock()
    _ = (await customer.put_card(BAD_CARD)).data
    await market.wait_until(add_months(start, 1))
    for _ in range(5):
        tried = len(market.gateway.charges)
        _ = (await customer.put_card(BAD_CARD)).data
        await market.wait(seconds=5)
        assert len(market.gateway.charges) == tried + 1
        assert await customer.status(pool_id) == "past_due"
    for days, status in ((1, "past_due"), (3, "past_due"), (5, "none")):
        await market.wait(days=days)
        assert await customer.status(pool_id) == status


@on_sqlite_only
async def test_a_charge_is_repeated_with_the_card_that_it_was_first_tried_with(market: Market) -> None:
    pool_id = await market.live_pool()
    customer, _ = await subscriber(market, pool_id)
    _ = (await customer.put_card(BAD_CARD)).data
    market.gateway.mute = True
    await market.wait(days=31)
    _ = (await customer.put_card("pm_card_amex")).error
    market.gateway.mute = False
    _ = (await customer.put_card("pm_card_amex")).data
    await market.wait(seconds=5)
    await market.settle()
    cards: dict[str, set[str]] = {}
    for charge_id, card, _ in market.gateway.charges:
        cards.setdefault(charge_id, set()).add(card)
    assert all(len(each) == 1 for each in cards.values())
    assert await customer.status(pool_id) == "active"


@on_sqlite_only
async def test_past_due_can_be_ended_at_once(market: Market) -> None:
    pool_id = await market.live_pool()
    customer, pledge_id = await subscriber(market, pool_id)
    before = await market.taken()
    _ = (await customer.put_card(BAD_CARD)).data
    await market.wait(days=31)
    assert (await customer.cancel(pledge_id)).data["status"] == "canceled"
    assert await customer.status(pool_id) == "none"
    _ = (await customer.put_card(GOOD_CARD)).data
    await market.wait(days=5)
    assert sorted(await market.taken()) == sorted([*before, 2_700])


@on_sqlite_only
async def test_no_month_is_charged_twice_however_often_the_gateway_fails(market: Market) -> None:
    pool_id = await market.live_pool()
    customer, _ = await subscriber(market, pool_id)
    for _ in range(3):
        market.gateway.mute = True
        await market.wait(days=30)
        for _ in range(3):
            await market.wait(hours=8)
        market.gateway.mute = False
        await market.wait(seconds=5)
    rows = await market.rows(
        """SELECT count(*) FROM ledger_entries JOIN charges ON charges.id = idempotency_key
        JOIN pledges ON pledges.id = pledge_id WHERE account_id = :account AND charges.amount_cents = 2700""",
        account=customer.id,
    )
    [(periods,)] = await market.rows(
        "SELECT periods FROM pledges WHERE account_id = :account", account=customer.id
    )
    assert rows == [(periods,)] == [(4,)]


# --- what was charged ------------------------------------------------------------------------------


async def test_charges_are_shown_newest_first_and_to_their_owner_only(market: Market) -> None:
    pool_id = await market.live_pool(slug="live")
    customer, pledge_id = await subscriber(market, pool_id)
    _ = (await customer.put_card(BAD_CARD)).data
    await market.wait(days=31)
    shown = (await customer.call("GET", "/api/billing/charges")).data
    newest, *older = [
        (each["purpose"], each["amount"], each["status"], each["declineCode"]) for each in shown
    ]
    assert newest == ("renewal", "27.00", "declined", "generic_decline")
    assert sorted(older) == [("first_month", "27.00", "paid", None), ("reservation", "1.00", "paid", None)]
    assert {each["pledgeId"] for each in shown} == {pledge_id}
    assert {each["poolSlug"] for each in shown} == {"live"}
    other = await market.customer()
    assert (await other.call("GET", "/api/billing/charges")).data == []
