"""Any sequence of calls, ticks, outages and crashes keeps the promises: the control plane beside a reference
model that shares no code with it.

The model is a few dictionaries that restate docs/pools-api.md. It predicts the status and the error code of
every call, the state of every pledge and pool after every step, and what the payment gateway has taken for
each pledge. Steps in which the control plane is known to do otherwise are left out, each with its reason, and
have a test of their own in tests/unit/control_plane.
"""

from __future__ import annotations

import asyncio
import atexit
import datetime
import logging
import random
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest
from hypothesis import HealthCheck, Phase, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from control_plane.accounts.service import new_operator_key
from control_plane.app import create_app
from control_plane.billing.gateway import Card, Outcome, PaymentGateway
from control_plane.billing.ledger_gateway import LedgerGateway
from control_plane.context import ControlPlane
from control_plane.database import Database
from control_plane.migrations import upgrade
from control_plane.nodes import orders
from control_plane.nodes.tables import Node
from control_plane.pledges.lifecycle import Lifecycle
from control_plane.pools.tables import Pool
from control_plane.vault import Vault
from tests.simulation.pledge_model import (
    SECOND,
    SUBSCRIBED,
    Crash,
    Line,
    Model,
    ModelPool,
    Refused,
)
from tests.unit.control_plane.conftest import ManualClock
from tests.unit.control_plane.market import (
    BAD_CARD,
    FEE_CENTS,
    GOOD_CARD,
    Answer,
    Customer,
    Market,
    swift_sqlite,
    without_fsync,
)

pytestmark = pytest.mark.slow

START = datetime.datetime(2026, 1, 31, 12, 0, tzinfo=datetime.UTC)
"""A 31st, which most months do not have."""
SPANS = (1.0, 6.0, 31.0, 600.0, 901.0, 86_400.0, 3 * 86_400.0, 5 * 86_400.0, 31 * 86_400.0, 62 * 86_400.0)
MOODS = ("up", "up", "up", "down", "mute", "crash")
PURPOSES = {"reservation": "fee", "first_month": "month", "renewal": "renewal"}
ACCOUNTS = range(4)
OFFERS: tuple[dict[str, tuple[int, int]], ...] = (
    {"night": (3, 2700), "europe": (2, 1001)},
    {"night": (2, 999)},
)
"""Of each pool: seats and cents by block."""
OFFERED_TOGETHER = ((("night",), ("europe",), ("night", "europe")), (("night",),) * 3)
Result = TypeVar("Result")


@dataclass
class FaultyGateway:
    """The real ledger behind such a line."""

    ledger: LedgerGateway
    line: Line
    about: Callable[[str], tuple[int, str]]
    """Whose charge it is, by its key, and what for."""

    async def attach(self, token: str) -> Card:
        self.line.arrive(None)
        card = await self.ledger.attach(token)
        self.line.answer(None)
        return card

    async def charge(self, idempotency_key: str, token: str, amount_cents: int, description: str) -> Outcome:
        about = self.about(idempotency_key)
        self.line.arrive(about)
        outcome = await self.ledger.charge(idempotency_key, token, amount_cents, description)
        self.line.answer(about)
        return outcome

    async def refund(self, idempotency_key: str) -> None:
        about = self.about(idempotency_key)
        self.line.arrive(about)
        await self.ledger.refund(idempotency_key)
        self.line.answer(about)


# --- the machine ---------------------------------------------------------------------------------------


def random_step(seed: bytes) -> tuple[Any, ...]:
    """One of the machine's steps. Hypothesis draws the seed: left to choose steps itself it repeats few of
    them often, and most states lie behind many different ones."""
    pick = random.Random(seed).choice
    account, pool = pick(ACCOUNTS), pick((0, 0, 1))
    blocks = pick((*OFFERED_TOGETHER[pool], *OFFERED_TOGETHER[pool], ("night", "americas")))
    quantity, card = pick((1, 1, 2)), pick((GOOD_CARD, GOOD_CARD, BAD_CARD))
    heard, age = pick((True, True, False)), pick((0, 0, 1, 2))
    kinds: list[tuple[int, tuple[Any, ...]]] = [
        (6, ("next_date", age, pick((-1, 0, 0, 1)), heard)),
        (5, ("buy", pool, blocks, quantity, card)),
        (2, ("buy_and_turn", pool, blocks, quantity)),
        (2, ("buy_through", pick(("down", "mute", "crash")), pick(("fee", "month")), pool, blocks)),
        (3, ("change_card", age, pick((GOOD_CARD, BAD_CARD)))),
        (2, ("time_passes", pick(SPANS), pick((0, 1, 2)), heard)),
        (2, ("operate", pool, pick(("next", "next", "next", "open", "pause", "resume")))),
        (2, ("end", age, pick((None, None, account)), pick((True, True, False)))),
        (2, ("close_for", pool, pick(SPANS))),
        (2, ("line_changes", pick(MOODS), pick((None, account, "month")))),
        (2, ("tick", pick((1, 2)))),
        (1, ("subscribe", account, pool, blocks, quantity)),
        (1, ("put_card", account, card)),
        (2, ("regret", age)),
        (1, ("withdraw", account, pool)),
        (1, ("look", account, pool)),
        (1, ("join", pool)),
        (1, ("drain", pick((0, 1, 2, 3)), pick((True, False)))),
        (1, ("retire", pick((0, 1, 2, 3)))),
        (1, ("restart",)),
        (1, ("all_is_well",)),
    ]
    return pick([step for often, step in kinds for _ in range(often)])


class Workshop:
    """What takes long to make and is the same in every example: an application, a database with its compiled
    statements, and a copy of that database in which everybody is there and nothing has happened yet."""

    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="boosts-lifecycle-")
        self.path = Path(self.folder.name) / "control-plane.db"
        self.runner = asyncio.Runner()
        nobody: Any = None
        self.app = create_app(nobody)
        self.database = Database(f"sqlite:///{self.path}")
        without_fsync(self.database)
        self.runner.run(self.set_scene())
        self.scene = self.path.read_bytes()

    async def set_scene(self) -> None:
        await upgrade(self.database)
        async with self.database.write() as session:
            self.operator_key = await new_operator_key(session, "ops@example.com", START)
        clock = ManualClock(START)
        market = self.market(clock, LedgerGateway(self.database, clock))
        customers = [await market.customer(card=None) for _ in ACCOUNTS]
        self.customers = [(customer.id, customer.key) for customer in customers]
        self.pool_ids = []
        for offer in OFFERS:
            blocks = {block: (seats, f"{cents / 100:.2f}") for block, (seats, cents) in offer.items()}
            self.pool_ids.append(await market.draft(blocks=blocks, min_seats=1))
        await self.database.close()

    def market(self, clock: ManualClock, gateway: PaymentGateway) -> Market:
        context = ControlPlane(self.database, clock, gateway, Vault(bytes(32)), "http://test")
        self.app.state.control_plane = context
        client = httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url=context.public_url)
        return Market(context, clock, client, Lifecycle(context), self.operator_key)

    def clear(self) -> None:
        """Everything as it was in the beginning."""
        self.runner.run(self.database.close())
        for path in self.path.parent.iterdir():
            path.unlink()
        self.path.write_bytes(self.scene)

    def close(self) -> None:
        self.runner.run(self.database.close())
        self.runner.close()
        self.folder.cleanup()


@cache
def workshop() -> Workshop:
    made = Workshop()
    atexit.register(made.close)
    return made


class Plant:
    """A control plane in which nothing has happened yet, and the model beside it."""

    def __init__(self, shop: Workshop, min_seats: tuple[int, ...]) -> None:
        shop.clear()
        self.run = shop.runner.run
        self.look = sqlite3.connect(shop.path, isolation_level=None)
        self.look.execute("PRAGMA synchronous = OFF")
        self.clock = ManualClock(START)
        self.line = Line()
        ledger = LedgerGateway(shop.database, self.clock)
        self.market = shop.market(self.clock, FaultyGateway(ledger, self.line, self.about))
        self.customers = [Customer(self.market, *each) for each in shop.customers]
        self.pool_ids = shop.pool_ids
        self.model = Model(self.line, START)
        for pool_id, offer, seats in zip(self.pool_ids, OFFERS, min_seats, strict=True):
            self.model.pools.append(ModelPool(offer, seats))
            self.look.execute("UPDATE pools SET min_seats = ? WHERE id = ?", (seats, pool_id))
        self.pledge_ids: list[str] = []
        """In the order of the model's pledges."""
        self.keys: dict[str, str] = {}
        self.revisions: dict[str, int] = {}
        self.told: list[Any] = []
        self.orders: dict[str, tuple[int, str]] = {}

    def rows(self, query: str, *values: object) -> list[Any]:
        return self.look.execute(query, values).fetchall()

    def about(self, charge_id: str) -> tuple[int, str]:
        query = """SELECT account_id, purpose FROM pledges
            JOIN charges ON pledge_id = pledges.id WHERE charges.id = ?"""
        [(account_id, purpose)] = self.rows(query, charge_id)
        return [customer.id for customer in self.customers].index(account_id), PURPOSES[purpose]

    def hear_all_nodes(self) -> None:
        query = "UPDATE nodes SET heard_at = ?, serving = 'ready', model_id = 'org/model'"
        self.look.execute(query, (self.clock.now.strftime("%Y-%m-%d %H:%M:%S.%f"),))

    def restart(self) -> None:
        """Another process takes over: what was only in memory is gone."""
        self.market.lifecycle = Lifecycle(self.market.context)
        self.model.rests_until = None
        self.model.resting.clear()

    def close(self) -> None:
        self.run(self.market.client.aclose())
        self.look.close()


def moment(stored: str | None) -> datetime.datetime | None:
    return None if stored is None else datetime.datetime.fromisoformat(stored).replace(tzinfo=datetime.UTC)


class LifecycleMachine(RuleBasedStateMachine):
    plant: Plant
    sound = False
    """Nothing has failed yet: the end of the run may be judged too."""

    @initialize(
        min_seats=st.tuples(st.integers(1, 4), st.integers(1, 2)),
        cards=st.lists(st.sampled_from((GOOD_CARD, GOOD_CARD, BAD_CARD, None)), min_size=4, max_size=4),
        stage=st.sampled_from(("draft", "funding", "funding", "live")),
    )
    def begin(self, min_seats: tuple[int, ...], cards: list[str | None], stage: str) -> None:
        self.swift = swift_sqlite()
        self.swift.__enter__()
        logging.getLogger("boosts.lifecycle").setLevel(logging.CRITICAL)
        self.plant = Plant(workshop(), min_seats)
        self.market, self.model, self.line = self.plant.market, self.plant.model, self.plant.line
        for account, card in enumerate(cards):
            if card is not None:
                self.put_card(account, card)
        if stage == "draft":
            return
        for pool in range(len(OFFERS)):
            self.operate(pool, "open")
            self.join(pool)
        if stage == "live":
            self.put_card(0, GOOD_CARD)
            self.subscribe(0, 0, ("night", "europe"), 2 if min_seats[0] > 2 else 1)
            self.tick(1)
            assert self.model.pools[0].state == "active"

    @rule(seed=st.binary(min_size=4, max_size=4))
    def act(self, seed: bytes) -> None:
        """One rule for all, or Hypothesis would leave some out of each run."""
        name, *arguments = random_step(seed)
        note(f"{name}{tuple(arguments)}")
        self.sound = False
        getattr(self, name)(*arguments)
        self.sound = True

    # --- customers ---------------------------------------------------------------------------------

    def put_card(self, account: int, card: str) -> None:
        call = self.plant.customers[account].put_card(card)
        self.play(lambda: self.model.put_card(account, card), call)

    def buy(self, pool: int, blocks: tuple[str, ...], quantity: int, card: str) -> None:
        """Somebody who has no pledge in the pool, with this card, while its nodes are there."""
        self.hear()
        free = [account for account in ACCOUNTS if self.model.open_pledge(account, pool) is None]
        if free:
            if self.model.cards.get(free[0]) != card:
                self.put_card(free[0], card)
            self.subscribe(free[0], pool, blocks, quantity)

    def buy_and_turn(self, pool: int, blocks: tuple[str, ...], quantity: int) -> None:
        """With a card that is good for the fee and for nothing after it."""
        self.buy(pool, blocks, quantity, GOOD_CARD)
        self.change_card(0, BAD_CARD)

    def buy_through(self, mood: str, purpose: str, pool: int, blocks: tuple[str, ...]) -> None:
        """Over a line that breaks at one of the charges."""
        self.line_changes(mood, purpose)
        self.buy(pool, blocks, 1, GOOD_CARD)

    def change_card(self, age: int, card: str) -> None:
        """Of somebody who has a pledge."""
        holders = [pledge.account for pledge in self.model.pledges if pledge.state != "canceled"]
        if holders:
            self.put_card(holders[max(0, len(holders) - 1 - age)], card)

    def subscribe(self, account: int, pool: int, blocks: tuple[str, ...], quantity: int) -> None:
        customer = self.plant.customers[account]
        call = customer.subscribe(self.plant.pool_ids[pool], *blocks, quantity=quantity)
        answer = self.play(lambda: self.model.subscribe(account, pool, blocks, quantity), call)
        if answer is not None and answer.status == 200:
            pledge = self.model.pledges[-1]
            assert answer.data["status"] == pledge.state
            assert answer.data["slotCount"] == 8 * pledge.seats
            assert answer.data["monthlyPrice"] == f"{pledge.cents / 100:.2f}"
            assert ("key" in answer.data) == (pledge.state == "active")

    def withdraw(self, account: int, pool: int) -> None:
        call = self.plant.customers[account].withdraw(self.plant.pool_ids[pool])
        self.expect(self.model.withdraw(account, pool), call)

    def regret(self, age: int) -> None:
        """Somebody withdraws who waits for a pool to go live."""
        waiting = [pledge for pledge in self.model.pledges if pledge.state in ("held", "pledged")]
        if waiting:
            pledge = waiting[max(0, len(waiting) - 1 - age)]
            self.withdraw(pledge.account, pledge.pool)

    def end(self, age: int, account: int | None, stop: bool) -> None:
        """A subscription, or what was one: by its owner, or by somebody who does not find it."""
        some = [i for i, pledge in enumerate(self.model.pledges) if pledge.state in SUBSCRIBED]
        some = some or list(range(len(self.model.pledges)))
        if not some:
            return
        which = some[max(0, len(some) - 1 - age)]
        pledge = self.model.pledges[which]
        account = pledge.account if account is None else account
        customer, pledge_id = self.plant.customers[account], self.plant.pledge_ids[which]
        predicted: Refused | None = (404, "pledge_not_found")
        if account == pledge.account:
            predicted = self.model.end(pledge, stop=stop)
        self.expect(predicted, (customer.cancel if stop else customer.resume)(pledge_id))

    def look(self, account: int, pool: int) -> None:
        customer, pool_id = self.plant.customers[account], self.plant.pool_ids[pool]
        pledge = self.model.open_pledge(account, pool)
        found = self.plant.run(customer.my_pledge(pool_id))
        key = self.plant.run(customer.my_key(pool_id))
        if self.model.pools[pool].state == "draft":
            assert found.refusal == key.refusal == (404, "pool_not_found")
            return
        if pledge is None or pledge.state == "held":
            assert found.refusal == key.refusal == (404, "pledge_not_found")
            return
        assert found.data["status"] == pledge.state
        assert len(found.data["hours"]) == 8 * pledge.seats
        if not pledge.months:
            assert found.data["key"] is None
            assert key.refusal == (404, "key_not_found")
            return
        assert found.data["key"] == key.data
        assert key.data["isActive"] == (pledge.state == "active")

    # --- operators, nodes, time ----------------------------------------------------------------------

    def operate(self, pool: int, what: str) -> None:
        model = self.model.pools[pool]
        starts = {"open": "draft", "pause": "active", "resume": "paused"}
        if what == "next":
            what = next((each for each, state in starts.items() if state == model.state), "open")
        predicted = None if model.state == starts[what] else (409, "wrong_pool_status")
        if predicted is None and what == "open":
            model.move("funding")
        elif predicted is None and what == "pause":
            model.move("paused")
            model.paused_at = self.model.now
        elif predicted is None:
            self.model.resume_pool(pool)
        self.expect(predicted, self.market.operate("POST", f"/pools/{self.plant.pool_ids[pool]}/{what}"))

    def close_for(self, pool: int, seconds: float) -> None:
        if self.model.pools[pool].state == "active":
            self.operate(pool, "pause")
            self.time_passes(seconds, 1, heard=True)
        if self.model.pools[pool].state == "paused":
            self.operate(pool, "resume")

    def join(self, pool: int) -> None:
        if sum(node["pool"] == pool for node in self.model.nodes) < 2:
            node_id = self.plant.run(self.market.node(self.plant.pool_ids[pool]))
            node = {"id": node_id, "pool": pool, "heard_at": self.model.now, "draining": False}
            self.model.nodes.append(node)

    def drain(self, which: int, draining: bool) -> None:
        if which < len(self.model.nodes):
            node = self.model.nodes[which]
            node["draining"] = draining
            word = "drain" if draining else "undrain"
            self.expect(None, self.market.operate("POST", f"/nodes/{node['id']}/{word}"))

    def retire(self, which: int) -> None:
        if which < len(self.model.nodes):
            node = self.model.nodes.pop(which)
            moved = self.plant.rows("SELECT id FROM pledges WHERE node_id = ?", node["id"])
            for pledge_id, pledge in zip(self.plant.pledge_ids, self.model.pledges, strict=True):
                pledge.placed &= (pledge_id,) not in moved
            self.expect(None, self.market.operate("POST", f"/nodes/{node['id']}/retire"))

    def time_passes(self, seconds: float, ticks: int, heard: bool) -> None:
        self.plant.clock.advance(seconds)
        self.model.now = self.plant.clock.now
        if heard:
            self.hear()
        self.tick(ticks)

    def hear(self) -> None:
        """All nodes."""
        for node in self.model.nodes:
            node["heard_at"] = self.model.now
        self.plant.hear_all_nodes()

    def next_date(self, which: int, offset: int, heard: bool) -> None:
        """Up to one of the next moments at which something is due, or a second beside it."""
        dates = sorted(date for date in self.model.dates() if date > self.model.now)
        if dates:
            span = dates[min(which, len(dates) - 1)] - self.model.now + offset * SECOND
            self.time_passes(max(0.0, span.total_seconds()), 1, heard)

    def tick(self, ticks: int) -> None:
        for _ in range(ticks):
            self.model.tick()
            self.plant.run(self.market.lifecycle.tick())

    def line_changes(self, mood: str, victim: int | str | None) -> None:
        self.line.mood, self.line.victim = mood, victim

    def restart(self) -> None:
        self.plant.restart()

    def all_is_well(self) -> None:
        """The gateway is back and some ticks run: nothing is left undone, and every cent is accounted for."""
        self.line.mood = "up"
        # Of a hold, each charge is left to whoever may still work on it, and one that failed rests.
        self.time_passes(61.0, 2, heard=True)
        self.time_passes(61.0, 2, heard=True)
        for pledge in self.model.pledges:
            assert not any(charge.state == "refunding" for charge in pledge.charges)
            if self.model.pools[pledge.pool].state not in ("activating", "paused"):
                assert not pledge.pending
                stood = [FEE_CENTS] if pledge.stood else []
                assert pledge.taken == sorted(stood + [pledge.cents] * pledge.months)

    def teardown(self) -> None:
        logging.getLogger("boosts.lifecycle").setLevel(logging.NOTSET)
        if hasattr(self, "plant"):
            try:
                if self.sound:
                    for pool, model in enumerate(self.model.pools):
                        if model.state == "paused":
                            self.operate(pool, "resume")
                    self.all_is_well()
                    self.check()
            finally:
                self.plant.close()
                self.swift.__exit__(None, None, None)

    # --- what must hold ------------------------------------------------------------------------------

    @invariant()
    def check(self) -> None:
        if hasattr(self, "plant"):
            self.sound = False
            self.pools_agree()
            self.pledges_agree()
            self.money_agrees()
            self.seats_are_sold_once()
            self.keys_are_for_life()
            self.revisions_rise()
            self.sound = True

    def pools_agree(self) -> None:
        states = dict(self.plant.rows("SELECT id, state FROM pools"))
        assert [states[pool_id] for pool_id in self.plant.pool_ids] == [p.state for p in self.model.pools]

    def pledges_agree(self) -> None:
        columns = (
            "id, state, cancel_at_period_end, failed_renewals, next_attempt_at, current_period_end, node_id"
        )
        found = {row[0]: row[1:] for row in self.plant.rows(f"SELECT {columns} FROM pledges")}  # noqa: S608
        new = found.keys() - set(self.plant.pledge_ids)
        assert len(self.plant.pledge_ids) + len(new) == len(self.model.pledges)
        self.plant.pledge_ids += new
        for pledge_id, pledge in zip(self.plant.pledge_ids, self.model.pledges, strict=True):
            state, stop, failures, retry_at, end, node_id = found[pledge_id]
            assert state == pledge.state
            if state == "canceled":
                continue
            assert (stop, failures, moment(retry_at)) == (pledge.stop, pledge.failures, pledge.retry_at)
            assert (node_id is not None) == pledge.placed
            assert moment(end) == pledge.end

    def money_agrees(self) -> None:
        query = """SELECT pledge_id, ledger_entries.amount_cents FROM ledger_entries
            JOIN charges ON charges.id = idempotency_key WHERE NOT refunded
            AND ledger_entries.decline_code IS NULL ORDER BY 2"""
        taken: dict[str, list[int]] = {}
        for pledge_id, cents in self.plant.rows(query):
            taken.setdefault(pledge_id, []).append(cents)
        for pledge_id, pledge in zip(self.plant.pledge_ids, self.model.pledges, strict=True):
            assert taken.pop(pledge_id, []) == pledge.taken
        assert not taken

    def seats_are_sold_once(self) -> None:
        query = """SELECT pledge_id, block, seat_id FROM reservations
            JOIN seats ON seats.id = seat_id WHERE released_at IS NULL"""
        reserved = self.plant.rows(query)
        assert len({seat_id for _, _, seat_id in reserved}) == len(reserved)
        found = Counter((pledge_id, block) for pledge_id, block, _ in reserved)
        expected = {
            (pledge_id, block): pledge.quantity
            for pledge_id, pledge in zip(self.plant.pledge_ids, self.model.pledges, strict=True)
            for block in pledge.blocks
            if pledge.state != "canceled"
        }
        assert found == expected

    def keys_are_for_life(self) -> None:
        keys = dict(self.plant.rows("SELECT pledge_id, key_sha256 FROM boost_keys"))
        assert self.plant.keys.items() <= keys.items()
        self.plant.keys = keys
        active = {i for i, p in zip(self.plant.pledge_ids, self.model.pledges, strict=True) if p.months}
        assert keys.keys() == active

    def revisions_rise(self) -> None:
        """With whatever a node is told, and they never fall."""
        revisions = dict(self.plant.rows("SELECT id, revision FROM pools"))
        for pool_id, revision in self.plant.revisions.items():
            assert revisions[pool_id] >= revision
        self.plant.revisions = revisions
        # Orders are made of these rows: unchanged, they need not be made again.
        told = [
            *self.plant.rows("SELECT id, state FROM pools"),
            *self.plant.rows("SELECT id, pool_id, draining FROM nodes"),
            *self.plant.rows("SELECT id, state, node_id, current_period_end FROM pledges"),
        ]
        if told != self.plant.told:
            self.plant.told = told
            self.orders_agree()

    def orders_agree(self) -> None:
        statuses: dict[str, str] = {}
        for node in self.model.nodes:
            told = self.plant.run(self.orders(node["id"]))
            revision = told.entitlements.revision
            content = told.model_dump_json().replace(f'"revision":{revision}', "")
            before, former = self.plant.orders.get(node["id"], (0, ""))
            assert content == former or revision > before
            self.plant.orders[node["id"]] = revision, content
            serves = self.model.pools[node["pool"]].state in ("activating", "active", "paused")
            assert told.serve == (serves and not node["draining"])
            statuses |= {each.pledge_id: each.status.value for each in told.entitlements.pledges}
        assert statuses == {
            pledge_id: pledge.state
            for pledge_id, pledge in zip(self.plant.pledge_ids, self.model.pledges, strict=True)
            if pledge.state in SUBSCRIBED and pledge.placed
        }

    async def orders(self, node_id: str) -> Any:
        async with self.market.database.read() as session:
            node = await session.get_one(Node, node_id)
            return await orders.build(session, await session.get_one(Pool, node.pool_id), node)

    # --- how -----------------------------------------------------------------------------------------

    def play(self, predict: Callable[[], Refused | None], call: Coroutine[Any, Any, Answer]) -> Answer | None:
        """Make the call; None where the control plane dies over it."""
        try:
            predicted = predict()
        except Crash:
            with pytest.raises(Crash):
                self.plant.run(call)
            self.plant.restart()
            return None
        return self.expect(predicted, call)

    def expect(self, predicted: Refused | None, call: Coroutine[Any, Any, Answer]) -> Answer:
        answer = self.plant.run(call)
        if predicted is None:
            assert answer.status == 200, answer.body
        else:
            assert answer.refusal == predicted
        return answer


LifecycleMachine.TestCase.settings = settings(
    max_examples=100,
    stateful_step_count=50,
    derandomize=True,
    report_multiple_bugs=False,
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestLifecycle = LifecycleMachine.TestCase
