"""The node's live state: the scheduler under a running event loop.

`Node` is the only caller of `Admission`, all on one event loop, so nothing here needs a lock. It
turns the scheduler's decisions into woken coroutines, and entitlements and time into its calls.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import NamedTuple

from contract.blocks import next_border
from contract.entitlements import Entitlements, PledgeEntitlement
from scheduler import Admission, Ask, Capacity, Policy, Reason, Refusal, SeatReading, SeatTerms, Ticket
from scheduler.seats import LimitReading
from serving.keyring import Keyring
from serving.metrics import DECISION_SECONDS, FIRST_TOKEN_SECONDS, QUEUE_WAIT_SECONDS
from serving.seat_rows import SeatRows

MIN_BODY_BYTES = 2**20
KEPT_REVOKED_SEATS = 1000
"""Seats without a pledge that are remembered with their counters and limits, should the pledge come back."""
TICK_S = 0.1
"""How late a queue timeout or a block's border may be noticed."""


class RefusedError(Exception):
    """The request may not run; its verdict says why."""


@dataclass(eq=False, slots=True)
class Place:
    """One prompt's place in the queue."""

    ask: Ask
    entered: asyncio.Future[None]
    ticket: Ticket | None = None


@dataclass(eq=False, slots=True)
class Verdict:
    """One HTTP request's fate, shared by the gateway that answers it and the engine client that asks.

    A list of prompts reaches the engine client as that many calls; they are decided together.
    """

    pledge: PledgeEntitlement
    prompts: int = 1
    dispatched: bool = False
    refusal: Refusal | None = None
    over: asyncio.Event = field(default_factory=asyncio.Event)
    """The request was refused, or is over."""
    places: list[Place] = field(default_factory=list)

    def refuse(self, refusal: Refusal) -> None:
        """The first refusal stands and ends the whole request."""
        if self.refusal is None:
            self.refusal = refusal
            self.over.set()
        for place in self.places:
            if not place.entered.done():
                place.entered.set_exception(RefusedError())


current_verdict: ContextVar[Verdict] = ContextVar("current_verdict")
"""Set by the gateway before it calls vLLM's application, read where vLLM calls `generate`."""


class StepOutput(NamedTuple):
    """What one engine step did for one sequence."""

    request_id: str
    new_tokens: int
    cached_tokens: int
    """Of the prompt, found in the prefix cache by this sequence."""


def engine_request_id(ticket: Ticket) -> str:
    """The id under which the engine knows a ticket."""
    return f"ticket-{ticket.number}"


class Node:
    """Queues, entitlements and counters of one engine.

    Invariants: every ticket is released exactly once, by the engine's last output or by the caller
    that leaves, whichever comes first; every waiting caller is woken in the end.
    """

    def __init__(
        self,
        capacity: Capacity,
        policy: Policy | None = None,
        *,
        rows: SeatRows | None = None,
        max_body_bytes: int = MIN_BODY_BYTES,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.admission = Admission(capacity, policy)
        self.rows = rows
        """The link to the step scheduler; None without one."""
        self.keyring: Keyring | None = None
        self.max_body_bytes = max_body_bytes
        self.clock = clock
        self.loop = asyncio.get_running_loop()
        self.wall_clock = wall_clock
        self._waiting: dict[int, tuple[Verdict, Place]] = {}
        self._running: dict[str, Ticket] = {}
        self._standings: dict[str, Reason | None] = {}
        self._open_exchanges: Counter[str] = Counter()
        self._checked_at = 0.0
        self._next_border = 0.0

    # --- entitlements and time ---------------------------------------------------------------------

    def apply(self, entitlements: Entitlements) -> None:
        """Take over a new snapshot: seats open, change and close; what runs is never cut."""
        self.keyring = Keyring(entitlements)
        self._standings = dict.fromkeys(self.admission.seat_ids(), Reason.REVOKED)
        self._settle_seats(self.keyring)

    async def run(self) -> None:
        """Notice queue timeouts and block borders, until canceled."""
        while True:
            await asyncio.sleep(TICK_S)
            self.follow_clock()
            self._tell_evicted(self.admission.expire(self.clock()))
            self.pump()

    def follow_clock(self) -> None:
        """Open and close seats whose block's border has passed."""
        now = self.wall_clock()
        # A clock that was set back may have crossed a border the other way.
        if self.keyring is not None and not self._checked_at <= now < self._next_border:
            self._settle_seats(self.keyring)

    def drain(self) -> None:
        """Take nothing new and give the queue back to its clients; what runs goes on."""
        self._tell_evicted(self.admission.drain(self.clock()))

    def standing(self, pledge: PledgeEntitlement) -> Reason | None:
        """Why the pledge may not be used right now; None if it may."""
        self.follow_clock()
        if self.admission.draining:
            return Reason.DRAINING
        return self._standings.get(pledge.pledge_id, Reason.REVOKED)

    def _settle_seats(self, keyring: Keyring) -> None:
        now, wall_now = self.clock(), self.wall_clock()
        self._checked_at, self._next_border = wall_now, float("inf")
        known = set(self.admission.seat_ids())
        for pledge in keyring.pledges.values():
            standing = keyring.standing(pledge, wall_now)
            self._standings[pledge.pledge_id] = standing
            if standing is None:
                self._open_seat(keyring.terms(pledge), now)
            elif self.admission.knows(pledge.pledge_id):
                self._close_seat(pledge.pledge_id, standing, now)
            until = pledge.valid_until.timestamp()
            borders = [next_border(pledge.spans, wall_now), *([until] if until > wall_now else [])]
            self._next_border = min(self._next_border, *borders)
        revoked = known - keyring.pledges.keys()
        for seat_id in revoked:
            self._close_seat(seat_id, Reason.REVOKED, now)
            if len(revoked) > KEPT_REVOKED_SEATS and self.admission.forget_seat(seat_id):
                del self._standings[seat_id]
                if self.rows is not None:
                    self.rows.forget(seat_id)
        self.pump()

    def _open_seat(self, terms: SeatTerms, now: float) -> None:
        self.admission.open_seat(terms, now)
        if self.rows is not None:
            self.rows.open(terms)

    def _close_seat(self, seat_id: str, reason: Reason, now: float) -> None:
        self._tell_evicted(self.admission.close_seat(seat_id, reason, now))
        if self.rows is not None:
            self.rows.close(seat_id)

    def idle(self) -> bool:
        """Whether nobody is served or waits, and somebody may come."""
        return not (self.admission.in_flight or self.admission.queued() or self.admission.draining)

    # --- readings ----------------------------------------------------------------------------------

    def readings(self) -> list[SeatReading]:
        """Every seat the node has served since it started and still knows."""
        now = self.clock()
        return [self.admission.read(seat_id, now) for seat_id in self.admission.seat_ids()]

    def read_limits(self, pledge: PledgeEntitlement) -> tuple[LimitReading, LimitReading] | None:
        """The key's request and token limit; None for a seat that has not been open yet."""
        if not self.admission.knows(pledge.pledge_id):
            return None
        return self.admission.read_limits(pledge.pledge_id, self.clock())

    def held_s(self, seat_id: str) -> float:
        """Sequence-seconds that the seat's requests were held between steps."""
        return 0.0 if self.rows is None else self.rows.held_s(seat_id)

    def open_seats(self) -> int:
        return sum(standing is None for standing in self._standings.values())

    def revision(self) -> int:
        """Of the entitlements in use; 0 before the first."""
        return 0 if self.keyring is None else self.keyring.entitlements.revision

    # --- requests ----------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def enter(self, verdict: Verdict, ask: Ask) -> AsyncIterator[Ticket]:
        """Wait until the prompt may enter the engine, and hold its ticket while it is inside.

        Raises RefusedError when it may not; the verdict then holds the refusal.
        """
        place = Place(ask, asyncio.get_running_loop().create_future())
        verdict.places.append(place)
        if len(verdict.places) > verdict.prompts:
            raise RuntimeError(f"a request of {verdict.prompts} prompts reached the engine with more")
        try:
            if len(verdict.places) == verdict.prompts:
                self._submit(verdict)
            await place.entered
            assert place.ticket is not None
            yield place.ticket
        finally:
            if place.ticket is not None:
                self._waiting.pop(place.ticket.number, None)
                self._release(place.ticket, self.clock())
                self.pump()

    def foresee(self, pledge: PledgeEntitlement, *, queues: bool) -> Refusal | None:
        """The refusal that is certain before the request has been read; `queues` if it would queue."""
        return self.admission.foresee(pledge.pledge_id, self.clock(), queues=queues)

    @contextlib.contextmanager
    def exchange_open(self, pledge: PledgeEntitlement) -> Iterator[Refusal | None]:
        """Count an open HTTP exchange; gives the refusal if the pledge has more than could run and queue."""
        bound = self.admission.policy.max_queued_per_seat * pledge.quantity + self.admission.capacity.slots
        open_now = self._open_exchanges[pledge.pledge_id]
        self._open_exchanges[pledge.pledge_id] += 1
        try:
            yield Refusal(Reason.QUEUE_FULL, 1.0, bound, open_now, 1) if open_now >= bound else None
        finally:
            self._open_exchanges[pledge.pledge_id] -= 1
            if not self._open_exchanges[pledge.pledge_id]:
                del self._open_exchanges[pledge.pledge_id]

    def charge_request(self, pledge: PledgeEntitlement) -> Refusal | None:
        """Count a request that never enters the engine against the request limit."""
        if not self.admission.knows(pledge.pledge_id):
            return Refusal(Reason.REVOKED)
        return self.admission.charge_request(pledge.pledge_id, self.clock())

    def pump(self) -> None:
        """Let in whatever may enter now."""
        started = time.perf_counter()
        now = self.clock()
        if self.rows is not None:
            self.admission.borrowed_limit = self.rows.table.borrowed_limit()
        entering = self.admission.dispatch(now)
        DECISION_SECONDS.observe(time.perf_counter() - started)
        for ticket in entering:
            verdict, place = self._waiting.pop(ticket.number)
            if place.entered.done():
                # Its client left a moment ago; `enter` gives the ticket back when it wakes.
                continue
            self._running[engine_request_id(ticket)] = ticket
            QUEUE_WAIT_SECONDS.observe(now - ticket.submitted_at)
            verdict.dispatched = True
            place.entered.set_result(None)

    def record_step(
        self, outputs: Iterable[StepOutput], finished: Collection[str], at: float | None = None
    ) -> None:
        """Account one engine step that ended `at`, by the clock that the engine shares with `clock`, and
        fill the slots of the requests that `finished` in it."""
        now = self.clock() if at is None else at
        produced: list[tuple[Ticket, int]] = []
        started: dict[Ticket, int] = {}
        for request_id, new_tokens, cached_tokens in outputs:
            ticket = self._running.get(request_id)
            if ticket is None or not new_tokens:
                continue
            produced.append((ticket, new_tokens))
            if ticket.first_token_at is None:
                # Sequences of one prompt find each other's blocks, which saves nothing over the one
                # prefill that was charged: the first to come, with the fewest hits, tells the truth.
                started[ticket] = min(started.get(ticket, cached_tokens), cached_tokens)
        for ticket, cached_tokens in started.items():
            FIRST_TOKEN_SECONDS.observe(now - ticket.submitted_at)
            self.admission.record_prefix_hit(ticket, cached_tokens)
        self.admission.record_step(produced, now)
        for request_id in finished:
            ticket = self._running.get(request_id)
            if ticket is not None:
                # Not at the clock: a busy event loop comes here late, and would call it owed meanwhile.
                self._release(ticket, now)
        if finished or started or self._more_is_of_use():
            self.pump()

    def _more_is_of_use(self) -> bool:
        """The step scheduler has use for more borrowed work than it had when work entered last."""
        return self.rows is not None and self.rows.table.borrowed_limit() > self.admission.borrowed_limit

    def _submit(self, verdict: Verdict) -> None:
        seat_id = verdict.pledge.pledge_id
        asks = [place.ask for place in verdict.places]
        if not self.admission.knows(seat_id):
            verdict.refuse(Refusal(Reason.REVOKED))
            return
        tickets = self.admission.submit(seat_id, asks, self.clock())
        if isinstance(tickets, Refusal):
            verdict.refuse(tickets)
            return
        for ticket, place in zip(tickets, verdict.places, strict=True):
            place.ticket = ticket
            self._waiting[ticket.number] = (verdict, place)
        self.pump()

    def _tell_evicted(self, evicted: Iterable[Ticket]) -> None:
        for ticket in evicted:
            verdict, _ = self._waiting.pop(ticket.number)
            assert ticket.refusal is not None
            verdict.refuse(ticket.refusal)

    def _release(self, ticket: Ticket, ended_at: float) -> None:
        self.admission.release(ticket, self.clock(), ended_at)
        self._running.pop(engine_request_id(ticket), None)
