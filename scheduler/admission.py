"""Admission: which queued request enters the engine, and when.

Theory of operation (docs/scheduling.md derives the bounds):

* A seat whose next request keeps it within its quantity of sequences is *owed*: that request enters at
  once, earliest first-token deadline first, whatever is in the engine: there the step policy
  (`scheduler.steps`) takes a slot or KV cache from borrowed work for it. All other work is *borrowed*;
  so is a request wider than the seat's unused seats. It enters while slots and KV cache are free, and
  while the step policy has use for it: what would only be held waits here, where the order is fair. A few
  slots stay free while owed requests keep coming; else a few sequences enter ahead of their slots.
* Borrowed work is ordered by start-time fair queuing (Goyal, Vin, Cheng, SIGCOMM 1996). A seat's
  `tag` is its virtual time: at dispatch it grows by `cost / weight` with the expected output; while
  tokens flow it is corrected upwards when the output outgrows the expectation, and downwards at the
  end for output that never came and for input that the prefix cache had. A seat whose queue was empty
  rejoins at no less than the system's virtual time: no credit for having been idle, and none later
  from refunds of work that it had paid for before.
* `submit` checks the request limit, the token limit and the queue's room, and only then debits them
  all; a refused request costs nothing.

All methods take `now` in seconds of one monotonic clock and never block. What the engine did is told with
the time at which it did it, which may lie behind that of the calls before.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from scheduler.buckets import RecentRate, TokenBucket
from scheduler.ledger import WINDOWS_S
from scheduler.limits import Limits
from scheduler.seats import LimitReading, Seat, SeatHeap, SeatReading
from scheduler.step_rules import UNLIMITED
from scheduler.terms import Ask, Capacity, Policy, SeatTerms
from scheduler.tickets import Event, Outcome, Reason, Refusal, State, Ticket


class Admission:
    """The admission stage of one node. Single-threaded; every ticket ends exactly once.

    Invariants: owed work in flight never exceeds the slots, and borrowed work enters only where all work
    leaves one free, or ahead of one; `virtual_time` never decreases; a seat with a queue is in a heap.
    """

    def __init__(self, capacity: Capacity, policy: Policy | None = None) -> None:
        self.capacity = capacity
        self.policy = policy or Policy()
        self._limits = Limits(self.policy)
        self.virtual_time = 0.0
        self.in_flight = 0
        self.borrowed_limit = UNLIMITED
        """Borrowed sequences that the step policy has use for; set by whoever knows it."""
        self.draining = False
        self._seats: dict[str, Seat] = {}
        self._owed_in_flight = 0
        self._kv_in_use = 0
        self._owed_kv_in_use = 0
        self._ends = RecentRate(1.0)
        self._owed_entries = RecentRate(4.0)
        self._last_number = 0
        self._queued: OrderedDict[int, Ticket] = OrderedDict()
        self._fair = SeatHeap(lambda seat: seat.tag, lambda seat: seat.backlogged)
        self._owed = SeatHeap(lambda seat: seat.head.deadline, lambda seat: seat.head_owed)

    # --- seats -----------------------------------------------------------------------------------

    def open_seat(self, terms: SeatTerms, now: float) -> None:
        """Let a seat in, or change its terms; its queue, debts and counters stay."""
        seat = self._seats.get(terms.seat_id)
        if seat is None:
            seat = self._seats[terms.seat_id] = Seat(terms, self.policy, now)
            seat.tag = self.virtual_time
            return
        owed = seat.owed
        seat.terms, seat.closed = terms, None
        seat.requests.resize(terms.rpm_limit, now)
        seat.tokens.resize(terms.tpm_limit, now)
        seat.ledger.set_terms(terms.guarantee_tok_s, terms.quantity, now)
        self._owed_in_flight += seat.owed - owed
        self._settle_owed_kv(seat)
        self._refresh(seat)

    def close_seat(self, seat_id: str, reason: Reason, now: float) -> list[Ticket]:
        """End a seat's block: what runs goes on as borrowed work, what is queued is evicted and returned."""
        seat = self._seats[seat_id]
        self._owed_in_flight -= seat.owed
        seat.closed = reason
        self._settle_owed_kv(seat)
        seat.ledger.set_terms(0.0, seat.terms.quantity, now)
        return [self._evict(ticket, Refusal(reason), now) for ticket in list(seat.queue.values())]

    def forget_seat(self, seat_id: str) -> bool:
        """Drop a closed seat without work, so that memory does not grow with the customers of years."""
        seat = self._seats[seat_id]
        if seat.closed is None or seat.queue or seat.in_flight:
            return False
        del self._seats[seat_id]
        return True

    def drain(self, now: float) -> list[Ticket]:
        """Take nothing new; returns the evicted queue."""
        self.draining = True
        return [self._evict(ticket, Refusal(Reason.DRAINING), now) for ticket in list(self._queued.values())]

    # --- requests --------------------------------------------------------------------------------

    def submit(self, seat_id: str, asks: Sequence[Ask], now: float) -> list[Ticket] | Refusal:
        """Queue the prompts of one request, all or none. Limits are checked first, then debited."""
        seat = self._seats[seat_id]
        refusal = self._closed_refusal(seat) or self._limits.refusal(seat, asks, self.capacity.slots, now)
        if refusal is not None:
            seat.outcomes[Outcome.REJECTED] += sum(ask.count for ask in asks)
            return refusal
        reserves = self._limits.reserves(seat, asks)
        return [self._enqueue(seat, ask, reserve, now) for ask, reserve in zip(asks, reserves, strict=True)]

    def foresee(self, seat_id: str, now: float, *, queues: bool = True) -> Refusal | None:
        """The refusal that any request of the seat would get now, before its size is known; `queues` is
        whether it would enter the queue."""
        seat = self._seats[seat_id]
        refusal = self._closed_refusal(seat) or self._limits.foreseen(seat, now, queues=queues)
        if refusal is not None:
            seat.outcomes[Outcome.REJECTED] += 1
        return refusal

    def charge_request(self, seat_id: str, now: float) -> Refusal | None:
        """Debit one request that never enters the engine (token counting)."""
        refusal = self.foresee(seat_id, now, queues=False)
        if refusal is None:
            self._seats[seat_id].requests.take(1, now)
        return refusal

    def dispatch(self, now: float) -> list[Ticket]:
        """The tickets that enter the engine now, in order: owed seats first, then by virtual time."""
        entering: list[Ticket] = []
        while True:
            seat = self._owed.peek() or self._fair.peek()
            if seat is None or not self._fits(seat.head, now, owed=seat.head_owed):
                return entering
            entering.append(self._start(seat.head, now, owed=seat.head_owed))

    def expire(self, now: float) -> list[Ticket]:
        """Evict and return what has been queued for the queue timeout."""
        evicted = []
        while self._queued:
            ticket = next(iter(self._queued.values()))
            if ticket.expires_at > now:
                break
            refusal = Refusal(Reason.QUEUE_TIMEOUT, self._limits.queue_wait_s(ticket.seat))
            evicted.append(self._evict(ticket, refusal, now))
        return evicted

    def next_expiry(self) -> float | None:
        """When `expire` has something to do; None if nothing is queued."""
        for ticket in self._queued.values():
            return ticket.expires_at
        return None

    def release(self, ticket: Ticket, now: float, ended_at: float | None = None) -> None:
        """The request is over, for whatever reason: a queued one is canceled, a running one finishes,
        one that has ended already stays as it is. `ended_at` is when the engine finished it, which may lie
        behind `now`: from then on it is owed nothing."""
        if ticket.state is State.QUEUED:
            ticket.apply(Event.CANCEL)
            self._leave_queue(ticket, now)
            ticket.seat.outcomes[Outcome.CANCELED] += ticket.count
            ticket.seat.tokens.give_back(ticket.reserved_tokens, now)
        elif ticket.state is State.RUNNING:
            ticket.apply(Event.FINISH)
            ticket.seat.ledger.end(ticket.number, ticket.count, now if ended_at is None else ended_at)
            self._finish(ticket, now)

    # --- what the engine did -----------------------------------------------------------------------

    def record_step(self, produced: Iterable[tuple[Ticket, int]], now: float) -> None:
        """Account one engine step: new output tokens by ticket. Late tokens of ended tickets count
        as delivered too: the engine did make them."""
        by_seat: dict[Seat, int] = {}
        for ticket, tokens in produced:
            seat = ticket.seat
            ticket.produced += tokens
            by_seat[seat] = by_seat.get(seat, 0) + tokens
            if ticket.first_token_at is None:
                ticket.first_token_at = now
                if not ticket.ended:
                    seat.unread -= 1
                    seat.ledger.first_token(ticket.number, now)
            if ticket.produced > ticket.charged_output and not ticket.ended:
                self._charge_output(ticket, ticket.produced)
        for seat, tokens in by_seat.items():
            seat.ledger.deliver(tokens, now)

    def record_prefix_hit(self, ticket: Ticket, cached_tokens: int) -> None:
        """The engine found `cached_tokens` of the prompt in its prefix cache: they cost nothing."""
        if cached_tokens <= ticket.cached_tokens or ticket.ended:
            return
        saved = cached_tokens - ticket.cached_tokens
        ticket.cached_tokens = cached_tokens
        # Shared blocks are held once, by whoever came first.
        ticket.kv_tokens -= saved
        self._kv_in_use -= saved
        if ticket.owed_kv_tokens:
            self._set_owed_kv(ticket, ticket.owed_kv_tokens - saved)
        self._charge(ticket, -saved * self.policy.input_weight)
        self._refresh(ticket.seat)

    # --- readings ----------------------------------------------------------------------------------

    def knows(self, seat_id: str) -> bool:
        """Whether the seat has been opened and not forgotten."""
        return seat_id in self._seats

    def seat_ids(self) -> list[str]:
        return list(self._seats)

    def queued(self) -> int:
        return len(self._queued)

    def read(self, seat_id: str, now: float) -> SeatReading:
        seat = self._seats[seat_id]
        owed_seconds, missed_seconds = seat.ledger.seconds(now)
        return SeatReading(
            seat_id=seat_id,
            queued=len(seat.queue),
            in_flight=seat.in_flight,
            requests={outcome.value: n for outcome, n in seat.outcomes.items()},
            input_tokens=seat.input_tokens,
            cached_tokens=seat.cached_tokens,
            output_tokens=seat.ledger.delivered,
            owed_tokens=seat.ledger.owed,
            borrowed_tokens=seat.ledger.borrowed,
            behind_tokens=seat.ledger.behind,
            shortfall_tokens=seat.ledger.shortfall,
            owed_seconds=owed_seconds,
            missed_seconds=missed_seconds,
            attainment={1: seat.ledger.lowest_second(now)}
            | {window: seat.ledger.attainment(window, now) for window in WINDOWS_S if window > 1},
            virtual_time=seat.tag,
        )

    def read_limits(self, seat_id: str, now: float) -> tuple[LimitReading, LimitReading]:
        """The request and the token limit as they stand at `now`."""
        seat = self._seats[seat_id]
        return _read_bucket(seat.requests, now), _read_bucket(seat.tokens, now)

    # --- inside ------------------------------------------------------------------------------------

    def _closed_refusal(self, seat: Seat) -> Refusal | None:
        if self.draining:
            return Refusal(Reason.DRAINING)
        return None if seat.closed is None else Refusal(seat.closed)

    def _enqueue(self, seat: Seat, ask: Ask, reserved_tokens: int, now: float) -> Ticket:
        self._last_number += 1
        due = self._due(seat, ask, now)
        ticket = Ticket(
            self._last_number,
            seat,
            input_tokens=ask.input_tokens,
            max_tokens=ask.max_tokens,
            count=ask.count,
            submitted_at=now,
            deadline=due,
            expires_at=now + self.policy.queue_timeout_s,
        )
        seat.requests.take(ask.count, now)
        ticket.reserved_tokens = reserved_tokens
        seat.tokens.take(reserved_tokens, now)
        if not seat.queue:
            self._rejoin(seat)
        seat.queue[ticket.number] = ticket
        seat.waiting += ticket.count
        seat.unread += 1
        self._queued[ticket.number] = ticket
        seat.ledger.expect(ticket.number, ticket.count, ticket.due)
        self._refresh(seat)
        return ticket

    def _due(self, seat: Seat, ask: Ask, now: float) -> float:
        """When the first token is due. Prompts that come faster than the seats read have to wait for those
        before them: their tokens were not sold for any earlier."""
        policy, terms = self.policy, seat.terms
        tokens = ask.input_tokens if policy.prefix_caching else ask.input_tokens * ask.count
        # What was read sooner, or not at all, leaves no debt.
        begin = max(seat.read_by, now) if seat.unread else now
        seat.read_by = begin + tokens / (terms.prefill_tok_s * terms.quantity)
        alone = now + ask.input_tokens / terms.prefill_tok_s
        return max(seat.read_by, alone) + policy.first_token_grace_s

    def _rejoin(self, seat: Seat) -> None:
        """Start backlogged at the virtual time of those who are, however long the seat was idle."""
        seat.joined_at = self.virtual_time
        if seat.tag < self.virtual_time:
            seat.tag = self.virtual_time
            seat.lifts += 1

    def _borrowable_slots(self, now: float) -> int:
        """Sequences that there may be in all when a borrowed one enters: a few less than slots while owed
        ones keep coming, else a few more."""
        policy, slots = self.policy, self.capacity.slots
        ends, owed_entries = self._ends.per_s(now), self._owed_entries.per_s(now)
        most = int(slots * policy.elastic_share)
        if owed_entries > policy.spare_from_per_s:
            return slots - min(most, math.ceil(2 * owed_entries / max(ends, owed_entries)))
        return slots + min(most, math.ceil(policy.ahead_s * ends))

    def _fits(self, ticket: Ticket, now: float, *, owed: bool) -> bool:
        """Whether there is room: for owed work all that is not in use by owed work."""
        if self.in_flight == 0:
            return True
        need = ticket.input_tokens + ticket.seat.expected(ticket.count, ticket.max_tokens)
        if owed:
            slots, kv_in_use = self.capacity.slots - self._owed_in_flight, self._owed_kv_in_use
        else:
            borrowed = self.in_flight - self._owed_in_flight
            slots, kv_in_use = self._borrowable_slots(now) - self.in_flight, self._kv_in_use
            # One at least, however wide: a limit for the pace's sake must not lock a request out.
            if borrowed > 0:
                slots = min(slots, self.borrowed_limit - borrowed)
        return ticket.count <= slots and kv_in_use + need <= self.capacity.kv_tokens

    def _start(self, ticket: Ticket, now: float, *, owed: bool) -> Ticket:
        seat, policy = ticket.seat, self.policy
        # An owed seat may enter ahead of the fair order, so virtual time follows the order, not the entry.
        fairest = self._fair.peek() or seat
        self.virtual_time = max(self.virtual_time, fairest.tag)
        ticket.apply(Event.DISPATCH)
        ticket.dispatched_at = now
        ticket.expected_output = seat.expected(ticket.count, ticket.max_tokens)
        ticket.kv_tokens = ticket.input_tokens + ticket.expected_output
        self._kv_in_use += ticket.kv_tokens
        if owed:
            self._set_owed_kv(ticket, ticket.kv_tokens)
            seat.owed_tickets[ticket.number] = ticket
            self._owed_entries.count(ticket.count, now)
        ticket.lifts, ticket.weight = seat.lifts, seat.terms.weight
        prefills = 1 if policy.prefix_caching else ticket.count
        self._charge(ticket, ticket.input_tokens * prefills * policy.input_weight)
        self._charge_output(ticket, round(ticket.expected_output * policy.foreseen_share))
        seat.outcomes[Outcome.DISPATCHED] += ticket.count
        seat.input_tokens += ticket.input_tokens
        if seat.last_dispatch is not None:
            gap = now - seat.last_dispatch
            seat.dispatch_gap_s += policy.output_mean_smoothing * (gap - seat.dispatch_gap_s)
        seat.last_dispatch = now
        self._set_in_flight(seat, ticket.count)
        self._unqueue(ticket)
        return ticket

    def _charge_output(self, ticket: Ticket, output_tokens: int) -> None:
        """Make `output_tokens` what the ticket has paid for, up or down."""
        change = (output_tokens - ticket.charged_output) * self.policy.output_weight
        ticket.charged_output = output_tokens
        self._charge(ticket, change)

    @staticmethod
    def _charge(ticket: Ticket, cost: float) -> None:
        """Move the seat's virtual time by `cost`, which is negative for a refund."""
        seat = ticket.seat
        if cost >= 0:
            seat.tag += cost / ticket.weight
        elif ticket.lifts == seat.lifts:
            seat.tag = max(seat.joined_at, seat.tag + cost / ticket.weight)
        # Else the seat was lifted since: the charge is forgiven, and a refund would be credit for idling.

    def _finish(self, ticket: Ticket, now: float) -> None:
        seat = ticket.seat
        self._kv_in_use -= ticket.kv_tokens
        self._set_owed_kv(ticket, 0)
        seat.owed_tickets.pop(ticket.number, None)
        seat.unread -= ticket.first_token_at is None
        self._charge_output(ticket, ticket.produced)
        seat.cached_tokens += ticket.cached_tokens
        used = ticket.input_tokens + ticket.produced
        seat.tokens.give_back(ticket.reserved_tokens - used, now)
        mean = ticket.produced / ticket.count
        seat.expected_output += self.policy.output_mean_smoothing * (mean - seat.expected_output)
        self._set_in_flight(seat, -ticket.count)
        self._ends.count(ticket.count, now)
        self._refresh(seat)

    def _evict(self, ticket: Ticket, refusal: Refusal, now: float) -> Ticket:
        ticket.apply(Event.EVICT)
        ticket.refusal = refusal
        self._leave_queue(ticket, now)
        ticket.seat.outcomes[Outcome.EVICTED] += ticket.count
        ticket.seat.requests.give_back(ticket.count, now)
        ticket.seat.tokens.give_back(ticket.reserved_tokens, now)
        return ticket

    def _leave_queue(self, ticket: Ticket, now: float) -> None:
        ticket.seat.unread -= 1
        ticket.seat.ledger.end(ticket.number, ticket.count, now)
        self._unqueue(ticket)

    def _unqueue(self, ticket: Ticket) -> None:
        seat = ticket.seat
        del seat.queue[ticket.number], self._queued[ticket.number]
        seat.waiting -= ticket.count
        self._refresh(seat)

    def _set_in_flight(self, seat: Seat, change: int) -> None:
        self._owed_in_flight -= seat.owed
        seat.in_flight += change
        self.in_flight += change
        self._owed_in_flight += seat.owed

    def _settle_owed_kv(self, seat: Seat) -> None:
        for ticket in seat.owed_tickets.values():
            self._set_owed_kv(ticket, ticket.kv_tokens if seat.guaranteed else 0)

    def _set_owed_kv(self, ticket: Ticket, tokens: int) -> None:
        self._owed_kv_in_use += tokens - ticket.owed_kv_tokens
        ticket.owed_kv_tokens = tokens

    def _refresh(self, seat: Seat) -> None:
        """Put a seat whose key may have fallen, or whose head is new, where `peek` finds it."""
        if seat.queue:
            self._fair.push(seat)
            if seat.head_owed:
                self._owed.push(seat)


def _read_bucket(bucket: TokenBucket, now: float) -> LimitReading:
    remaining = max(0, int(bucket.level(now)))
    return LimitReading(bucket.limit, remaining, max(0.0, bucket.seconds_to_full(now)))
