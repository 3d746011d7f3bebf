"""The life of pledges restated with plain lists: for test_pledge_lifecycle.py to compare with.

It follows docs/pools-api.md, in the steps in which the control plane does things, and shares no code with it.
"""

from __future__ import annotations

import calendar
import datetime
from dataclasses import dataclass, field
from typing import Any

from control_plane.billing.gateway import GatewayUnavailable
from tests.unit.control_plane.market import FEE_CENTS, GOOD_CARD

SECOND = datetime.timedelta(seconds=1)
HANDLER_TIME = 30 * SECOND
HOLD_TIME = 900 * SECOND
GATEWAY_REST = 5 * SECOND
CHARGE_REST = 60 * SECOND
HEARD = 40 * SECOND
PATIENCE = datetime.timedelta(hours=1)
"""So long a pool that is paid waits for a node before the money goes back."""
FOREVER = datetime.datetime.max.replace(tzinfo=datetime.UTC)
HONOURED = datetime.timedelta(hours=72)
"""So long after its paid period a node goes on with a pledge, should the control plane be away."""
RETRIES = [datetime.timedelta(days=days) for days in (1, 3, 5)]
SUBSCRIBED = ("active", "past_due")
ARROWS = {
    ("draft", "funding"),
    ("funding", "activating"),
    ("activating", "funding"),
    ("activating", "active"),
    ("active", "paused"),
    ("paused", "active"),
}

Refused = tuple[int, str]
"""A status and an error code."""


class Crash(BaseException):
    """The process dies: nothing after this line happens."""


@dataclass
class Line:
    """What becomes of calls to the payment gateway."""

    mood: str = "up"
    """up; down: no call arrives; mute: calls take effect, no answer comes; crash: the process dies of it."""
    victim: int | str | None = None
    """Only the charges of this account or for this purpose; None: every call."""

    def hits(self, about: tuple[int, str] | None) -> bool:
        """`about` is whose charge the call is about, and what for."""
        return self.mood != "up" and (self.victim is None or self.victim in (about or ()))

    def arrive(self, about: tuple[int, str] | None) -> None:
        if self.hits(about) and self.mood == "down":
            raise GatewayUnavailable("the line is dead")

    def answer(self, about: tuple[int, str] | None) -> None:
        if self.hits(about) and self.mood == "mute":
            raise GatewayUnavailable("the line broke before the answer")
        if self.hits(about) and self.mood == "crash":
            raise Crash


@dataclass
class ModelCharge:
    purpose: str
    cents: int
    made_at: datetime.datetime
    attempt: int = 0
    state: str = "pending"
    card: str | None = None
    """With which it was first tried; it is repeated with no other."""
    book: str | None = None
    """What the gateway has in its book: paid, declined or void."""
    settled_at: datetime.datetime = FOREVER


@dataclass
class ModelPool:
    offer: dict[str, tuple[int, int]]
    min_seats: int
    state: str = "draft"
    attempt: int = 0
    paused_at: datetime.datetime | None = None

    def move(self, state: str) -> None:
        assert (self.state, state) in ARROWS
        self.state = state


@dataclass
class ModelPledge:
    account: int
    pool: int
    blocks: tuple[str, ...]
    quantity: int
    cents: int
    made_at: datetime.datetime
    state: str = "held"
    stood: bool = False
    """The reservation came about: the fee stays."""
    months: int = 0
    """Bought."""
    anchor: datetime.datetime | None = None
    """From where the months are counted whose number is `since`."""
    since: int = 0
    end: datetime.datetime | None = None
    stop: bool = False
    failures: int = 0
    retry_at: datetime.datetime | None = None
    retry_now: bool = False
    placed: bool = False
    charges: list[ModelCharge] = field(default_factory=list)

    @property
    def seats(self) -> int:
        return self.quantity * len(self.blocks)

    @property
    def pending(self) -> list[ModelCharge]:
        return [charge for charge in self.charges if charge.state == "pending"]

    @property
    def taken(self) -> list[int]:
        return sorted(charge.cents for charge in self.charges if charge.book == "paid")

    def month_in(self, attempt: int) -> list[ModelCharge]:
        return [each for each in self.charges if each.purpose == "month" and each.attempt == attempt]


@dataclass
class Model:
    line: Line
    now: datetime.datetime
    pools: list[ModelPool] = field(default_factory=list)
    pledges: list[ModelPledge] = field(default_factory=list)
    cards: dict[int, str] = field(default_factory=dict)
    nodes: list[dict[str, Any]] = field(default_factory=list)
    rests_until: datetime.datetime | None = None
    resting: list[tuple[ModelCharge, datetime.datetime]] = field(default_factory=list)
    """Charges that could not be settled, and until when they are left alone."""

    # --- looking ---

    def open_pledge(self, account: int, pool: int) -> ModelPledge | None:
        found = [each for each in self.of_pool(pool) if each.account == account and each.state != "canceled"]
        assert len(found) <= 1
        return found[0] if found else None

    def of_pool(self, pool: int, *states: str) -> list[ModelPledge]:
        return [each for each in self.pledges if each.pool == pool and (not states or each.state in states)]

    def free(self, pool: int, block: str) -> int:
        holders = [each for each in self.of_pool(pool) if each.state != "canceled" and block in each.blocks]
        return self.pools[pool].offer[block][0] - sum(each.quantity for each in holders)

    def has_node(self, pool: int, *, ready: bool) -> bool:
        return any(
            node["pool"] == pool
            and not node["draining"]
            and (not ready or (node["heard_at"] is not None and self.now - node["heard_at"] <= HEARD))
            for node in self.nodes
        )

    def dates(self) -> list[datetime.datetime]:
        """When something is due, or was."""
        dates = []
        for pledge in self.pledges:
            if pledge.state == "held":
                dates += [pledge.made_at + HANDLER_TIME, pledge.made_at + HOLD_TIME]
            elif pledge.state in SUBSCRIBED:
                dates += [date for date in (pledge.end, pledge.retry_at) if date is not None]
        return dates

    # --- calls: None where they succeed ---

    def subscribe(self, account: int, pool: int, blocks: tuple[str, ...], quantity: int) -> Refused | None:
        if refused := self.refuses(account, pool, blocks, quantity):
            return refused
        cents = quantity * sum(self.pools[pool].offer[block][1] for block in blocks)
        pledge = ModelPledge(account, pool, blocks, quantity, cents, self.now)
        self.pledges.append(pledge)
        pledge.charges.append(ModelCharge("fee", FEE_CENTS, self.now))
        try:
            while pledge.pending:
                self.settle(pledge, pledge.pending[0])
        except GatewayUnavailable:
            return 503, "payment_unavailable"
        return (402, "card_declined") if pledge.state == "canceled" else None

    def refuses(self, account: int, pool: int, blocks: tuple[str, ...], quantity: int) -> Refused | None:
        """The first reason not to hold the seats."""
        offer, found = self.pools[pool].offer, self.open_pledge(account, pool)
        reasons = {
            (404, "pool_not_found"): self.pools[pool].state == "draft",
            (409, "pool_paused"): self.pools[pool].state == "paused",
            (409, "payment_pending"): found is not None and found.state == "held",
            (409, "pledge_exists"): found is not None,
            (402, "payment_method_required"): account not in self.cards,
            (422, "block_not_offered"): not set(blocks) <= set(offer),
            (503, "pool_unavailable"): self.pools[pool].state == "active"
            and not self.has_node(pool, ready=True),
            (409, "sold_out"): any(self.free(pool, block) < quantity for block in set(blocks) & set(offer)),
        }
        return next((refused for refused, holds in reasons.items() if holds), None)

    def withdraw(self, account: int, pool: int) -> Refused | None:
        if self.pools[pool].state == "draft":
            return 404, "pool_not_found"
        pledge = self.open_pledge(account, pool)
        if pledge is None:
            return 404, "pledge_not_found"
        if pledge.state in SUBSCRIBED:
            return 409, "use_billing_portal"
        if pledge.state == "held":
            self.give_fee_back(pledge)
            self.cancel(pledge)
            return None
        if any(each.purpose == "month" and each.state in ("pending", "paid") for each in pledge.charges):
            return 409, "pool_activating"
        self.cancel(pledge)
        return None

    def end(self, pledge: ModelPledge, *, stop: bool) -> Refused | None:
        if pledge.state not in SUBSCRIBED:
            return 404, "pledge_not_found"
        pledge.stop = stop
        assert pledge.end is not None
        if stop and pledge.end <= (self.pools[pledge.pool].paused_at or self.now):
            self.cancel(pledge)
        return None

    def put_card(self, account: int, card: str) -> Refused | None:
        try:
            self.line.arrive(None)
            self.line.answer(None)
        except GatewayUnavailable:
            return 503, "payment_unavailable"
        self.cards[account] = card
        for pledge in self.pledges:
            if pledge.account == account and pledge.state == "past_due":
                pledge.retry_now = True
        return None

    def resume_pool(self, pool_index: int) -> None:
        pool = self.pools[pool_index]
        assert pool.paused_at is not None
        for pledge in self.of_pool(pool_index, *SUBSCRIBED):
            assert pledge.end is not None
            pledge.end += self.now - pool.paused_at
            pledge.anchor, pledge.since = pledge.end, 0
            if pledge.retry_at is not None:
                pledge.retry_at += self.now - pool.paused_at
        pool.paused_at = None
        pool.move("active")

    # --- what happens by itself ---

    def tick(self) -> None:
        for pledge in self.pledges:
            if pledge.state == "held" and self.now - pledge.made_at >= HOLD_TIME:
                self.give_fee_back(pledge)
                self.cancel(pledge)
        for index, pool in enumerate(self.pools):
            self.begin_activation(index, pool)
        for index, pool in enumerate(self.pools):
            if pool.state in ("active", "activating") and self.has_node(index, ready=True):
                for pledge in self.uncharged(index):
                    pledge.charges.append(ModelCharge("month", pledge.cents, self.now, pool.attempt))
        for pledge in self.pledges:
            self.begin_renewal(pledge)
        self.settle_all()
        for index, pool in enumerate(self.pools):
            if pool.state == "activating" and self.has_begun(index) and not self.uncharged(index):
                waiting = [c for p in self.of_pool(index) for c in p.pending if c.purpose == "month"]
                if not waiting:
                    self.decide(index, pool)
        for pledge in self.pledges:
            if pledge.state in SUBSCRIBED:
                pledge.placed |= self.has_node(pledge.pool, ready=False)

    def begin_activation(self, index: int, pool: ModelPool) -> None:
        enough = sum(pledge.seats for pledge in self.of_pool(index, "pledged")) >= pool.min_seats
        if pool.state == "funding" and enough:
            pool.move("activating")
            pool.attempt += 1
        elif pool.state == "activating" and not enough and not self.has_begun(index):
            pool.move("funding")

    def has_begun(self, index: int) -> bool:
        return any(pledge.month_in(self.pools[index].attempt) for pledge in self.of_pool(index))

    def uncharged(self, index: int) -> list[ModelPledge]:
        attempt = self.pools[index].attempt
        return [each for each in self.of_pool(index, "pledged") if not each.month_in(attempt)]

    def decide(self, index: int, pool: ModelPool) -> None:
        paid: list[tuple[ModelPledge, ModelCharge]] = []
        for pledge in self.of_pool(index, "pledged"):
            [month] = pledge.month_in(pool.attempt)
            if month.state == "paid":
                paid.append((pledge, month))
            else:
                self.cancel(pledge)
        enough = sum(pledge.seats for pledge, _ in paid) >= pool.min_seats
        ready = self.has_node(index, ready=True)
        if enough and not ready and self.now - min(month.settled_at for _, month in paid) < PATIENCE:
            return
        if enough and ready:
            pool.move("active")
            for pledge, _ in paid:
                self.activate(pledge)
        else:
            pool.move("funding")
            for _, month in paid:
                month.state = "refunding"

    def begin_renewal(self, pledge: ModelPledge) -> None:
        over = pledge.state == "active" and pledge.end is not None and pledge.end <= self.now
        again = pledge.state == "past_due" and (pledge.retry_now or self.is_scheduled(pledge))
        if self.pools[pledge.pool].state != "active" or not (over or again) or pledge.pending:
            return
        if pledge.stop:
            self.cancel(pledge)
        else:
            pledge.retry_now = False
            pledge.charges.append(ModelCharge("renewal", pledge.cents, self.now))

    def is_scheduled(self, pledge: ModelPledge) -> bool:
        return pledge.retry_at is not None and pledge.retry_at <= self.now

    def settle_all(self) -> None:
        if self.rests_until is not None and self.now < self.rests_until:
            return
        due = [(pledge, charge) for pledge in self.pledges for charge in pledge.charges]
        due = [(pledge, charge) for pledge, charge in due if self.is_due(pledge, charge)]
        for pledge, charge in due:
            try:
                self.settle(pledge, charge)
            except GatewayUnavailable:
                self.rests_until = self.now + GATEWAY_REST
            except Crash:
                self.resting.append((charge, self.now + CHARGE_REST))

    def is_due(self, pledge: ModelPledge, charge: ModelCharge) -> bool:
        if any(each is charge and until > self.now for each, until in self.resting):
            return False
        if charge.state == "pending":
            left_to_handler = pledge.state == "held" and self.now - charge.made_at < HANDLER_TIME
            return not left_to_handler and self.pools[pledge.pool].state != "paused"
        return charge.state == "refunding"

    # --- one pledge ---

    def settle(self, pledge: ModelPledge, charge: ModelCharge) -> None:
        about = pledge.account, charge.purpose
        if charge.state == "pending" and charge.card is None:
            charge.card = self.cards[pledge.account]
        self.line.arrive(about)
        if charge.state == "refunding":
            charge.book = "void"
            self.line.answer(about)
            charge.state = "refunded"
            return
        if charge.book is None:
            charge.book = "paid" if charge.card == GOOD_CARD else "declined"
        self.line.answer(about)
        charge.state, charge.settled_at = charge.book, self.now
        if charge.purpose == "fee":
            self.follow_fee(pledge, charge.book == "paid")
        elif charge.purpose == "month":
            self.follow_month(pledge, charge.book == "paid")
        elif charge.book == "paid":
            self.renew(pledge, charge)
        else:
            self.fail_renewal(pledge, charge)

    def follow_fee(self, pledge: ModelPledge, paid: bool) -> None:
        pool = self.pools[pledge.pool]
        if not paid:
            self.cancel(pledge)
        elif pool.state == "active":
            pledge.charges.append(ModelCharge("month", pledge.cents, self.now, pool.attempt))
        else:
            pledge.state, pledge.stood = "pledged", True

    def follow_month(self, pledge: ModelPledge, paid: bool) -> None:
        if self.pools[pledge.pool].state == "activating":
            return
        if paid:
            self.activate(pledge)
            return
        if not pledge.stood:
            self.give_fee_back(pledge)
        self.cancel(pledge)

    def renew(self, pledge: ModelPledge, charge: ModelCharge) -> None:
        assert pledge.end is not None
        if pledge.state == "active" and charge.made_at - pledge.end > HONOURED:
            pledge.anchor, pledge.since = charge.made_at, 0
        assert pledge.anchor is not None
        pledge.months += 1
        pledge.since += 1
        pledge.end = month_later(pledge.anchor, pledge.since)
        pledge.state, pledge.failures, pledge.retry_at, pledge.retry_now = "active", 0, None, False

    def fail_renewal(self, pledge: ModelPledge, charge: ModelCharge) -> None:
        pledge.retry_now = self.cards[pledge.account] != charge.card
        if pledge.retry_at is not None and charge.made_at < pledge.retry_at:
            return  # Beside the schedule, for a new card.
        pledge.failures += 1
        if pledge.failures > len(RETRIES):
            self.cancel(pledge)
        else:
            pledge.state = "past_due"
            pledge.retry_at = self.now + RETRIES[pledge.failures - 1]

    def activate(self, pledge: ModelPledge) -> None:
        pledge.state, pledge.stood = "active", True
        pledge.anchor, pledge.end = self.now, month_later(self.now, 1)
        pledge.months = pledge.since = 1
        pledge.placed = self.has_node(pledge.pool, ready=False)

    def cancel(self, pledge: ModelPledge) -> None:
        pledge.state, pledge.retry_at = "canceled", None
        for charge in pledge.pending:
            charge.state = "refunding"

    def give_fee_back(self, pledge: ModelPledge) -> None:
        for charge in pledge.charges:
            if charge.purpose == "fee" and charge.state in ("pending", "paid"):
                charge.state = "refunding"


def month_later(start: datetime.datetime, months: int) -> datetime.datetime:
    year, month = start.year + (start.month - 1 + months) // 12, (start.month - 1 + months) % 12 + 1
    return start.replace(year=year, month=month, day=min(start.day, calendar.monthrange(year, month)[1]))
