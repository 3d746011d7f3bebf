"""Oracles: what admission promises, checked on the trace of a simulation from outside.

They share no code with the scheduler: a `View` follows the trace with its own bookkeeping (its own token
buckets, its own expected outputs), and each oracle asks it whether what the scheduler did was right. An
oracle reports a broken promise as a line of text that begins with the oracle's name.

docs/scheduling.md derives the bound that `fairness` holds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations

from benchmarks.simulator import trace

EPSILON = 1e-6
MOST_REPORTED = 20


@dataclass(frozen=True, slots=True)
class Promised:
    """The constants the promises name; as in the scheduling contract, not as in the code under test."""

    input_weight: float = 1.0
    output_weight: float = 2.0
    first_token_grace_s: float = 1.0
    queue_timeout_s: float = 60.0
    max_queued_per_seat: int = 256
    initial_output_tokens: float = 256.0
    output_mean_smoothing: float = 0.1
    borrowed_kv_share: float = 0.9
    max_reserve_share: float = 0.5


@dataclass(slots=True)
class Bucket:
    """A limit per minute, refilled continuously."""

    limit: int
    level: float
    at: float

    def add(self, units: float, now: float) -> None:
        refilled = min(float(self.limit), self.level + (now - self.at) * self.limit / 60.0)
        self.level = min(float(self.limit), refilled + units)
        self.at = now


@dataclass(slots=True)
class SeatView:
    """A seat as seen from outside."""

    terms: trace.SeatOpened
    requests: Bucket
    tokens: Bucket
    open: bool = True
    queue: list[int] = field(default_factory=list)
    waiting: int = 0
    running: int = 0
    """Sequences in the engine."""
    tickets: int = 0
    """Prompts in the engine."""
    expected: float = 0.0
    service: float = 0.0
    """Cost of what the engine did for it."""
    largest_cost: float = 0.0
    most_tickets: int = 0
    owed_entries: float = 0.0
    """Cost of the prompts that entered under the guarantee."""
    changes: int = 0
    """Counts all that may change whether a retry is admitted."""

    @property
    def unused(self) -> int:
        if not self.open or self.terms.guarantee_tok_s == 0:
            return 0
        return max(0, self.terms.quantity - self.running)


@dataclass(slots=True)
class PromptView:
    """A prompt as seen from outside."""

    prompt: trace.Prompt
    submitted_at: float
    reserved: float = 0.0
    kv_tokens: int = 0
    upfront: float = 0.0
    cost: float = 0.0
    """Cost of what the engine did for it so far."""
    produced: int = 0
    first_token_at: float | None = None
    entered: bool = False
    owed: bool = False
    outcomes: list[str] = field(default_factory=list)
    ended_at: float | None = None


class View:
    """The node as the trace shows it."""

    def __init__(self, promised: Promised) -> None:
        self.promised = promised
        self.slots = 0
        self.kv_tokens = 0
        self.in_flight = 0
        self.kv_in_use = 0
        self.virtual_time = 0.0
        self.seats: dict[str, SeatView] = {}
        self.prompts: dict[int, PromptView] = {}
        self.reserve_whole = True
        """No seat was opened, and no slot lost, while others held the slots that it is owed."""

    # --- what an oracle asks -----------------------------------------------------------------------

    @property
    def reserve(self) -> int:
        """Slots to keep free from borrowed work."""
        return min(self.unused, int(self.slots * self.promised.max_reserve_share))

    @property
    def unused(self) -> int:
        return sum(seat.unused for seat in self.seats.values())

    @property
    def feasible(self) -> bool:
        """All seats that are open now can have their slots at once."""
        sold = sum(s.terms.quantity for s in self.seats.values() if s.open and s.terms.guarantee_tok_s > 0)
        return self.reserve_whole and sold <= int(self.slots * self.promised.max_reserve_share)

    def expected_output(self, prompt: trace.Prompt) -> int:
        seat = self.seats[prompt.seat_id]
        return prompt.count * min(math.ceil(seat.expected - EPSILON), prompt.max_tokens)

    def need(self, prompt: trace.Prompt) -> int:
        """KV tokens that the prompt takes, as expected."""
        return prompt.input_tokens + self.expected_output(prompt)

    def reservation(self, prompts: Iterable[trace.Prompt], limit: int) -> int:
        return min(limit, sum(self.need(prompt) for prompt in prompts))

    def fits(self, prompt: trace.Prompt, *, owed: bool) -> bool:
        free = self.slots - self.in_flight - (0 if owed else self.reserve)
        kv = self.kv_tokens if owed else int(self.kv_tokens * self.promised.borrowed_kv_share)
        return prompt.count <= free and self.kv_in_use + self.need(prompt) <= kv

    def heads(self) -> Iterator[tuple[SeatView, trace.Prompt]]:
        for seat in self.seats.values():
            if seat.queue:
                yield seat, self.prompts[seat.queue[0]].prompt

    # --- how it follows the trace --------------------------------------------------------------------

    def follow(self, event: trace.Event) -> None:
        match event:
            case trace.Stepped():
                self._step(event)
            case trace.Settled():
                self.virtual_time = event.virtual_time
            case trace.Queued():
                self._queue(event)
            case trace.Refused():
                for prompt in event.prompts:
                    view = self.prompts[prompt.number] = PromptView(prompt, event.at)
                    view.outcomes.append("rejected")
            case trace.Entered():
                self._enter(event)
            case trace.Finished():
                self._finish(self.prompts[event.number], event.at)
            case trace.Canceled() | trace.Evicted():
                self._leave_queue(event)
            case trace.SeatOpened():
                self._open(event)
            case trace.SeatClosed():
                self.seats[event.seat_id].open = False
                self.seats[event.seat_id].changes += 1
            case trace.CapacityChanged():
                self.slots, self.kv_tokens = event.slots, event.kv_tokens
                self.reserve_whole = self.slots - self.in_flight >= self.unused
        if self.slots - self.in_flight >= self.unused:
            self.reserve_whole = True

    def _open(self, event: trace.SeatOpened) -> None:
        seat = self.seats.get(event.seat_id)
        if seat is None:
            requests = Bucket(event.rpm_limit, float(event.rpm_limit), event.at)
            tokens = Bucket(event.tpm_limit, float(event.tpm_limit), event.at)
            seat = self.seats[event.seat_id] = SeatView(event, requests, tokens)
            seat.expected = self.promised.initial_output_tokens
        seat.open = True
        seat.changes += 1
        self.reserve_whole = self.slots - self.in_flight >= self.unused

    def _queue(self, event: trace.Queued) -> None:
        seat = self.seats[event.seat_id]
        left = seat.terms.tpm_limit
        for prompt in event.prompts:
            view = self.prompts[prompt.number] = PromptView(prompt, event.at)
            view.reserved = min(left, self.need(prompt))
            left -= int(view.reserved)
            seat.requests.add(-prompt.count, event.at)
            seat.tokens.add(-view.reserved, event.at)
            seat.queue.append(prompt.number)
            seat.waiting += prompt.count
        seat.changes += 1

    def _enter(self, event: trace.Entered) -> None:
        view = self.prompts[event.number]
        prompt, seat = view.prompt, self.seats[view.prompt.seat_id]
        view.outcomes.append("dispatched")
        view.entered = True
        view.owed = prompt.count <= seat.unused
        expected = self.expected_output(prompt)
        view.upfront = (
            prompt.input_tokens * self.promised.input_weight + expected * self.promised.output_weight
        )
        view.kv_tokens = prompt.input_tokens + expected - event.cached_tokens
        self.kv_in_use += view.kv_tokens
        seat.queue.remove(event.number)
        seat.waiting -= prompt.count
        seat.running += prompt.count
        seat.tickets += 1
        seat.most_tickets = max(seat.most_tickets, seat.tickets)
        seat.largest_cost = max(seat.largest_cost, view.upfront)
        seat.changes += 1
        self.in_flight += prompt.count

    def _step(self, event: trace.Stepped) -> None:
        for number, prefill, made in event.work:
            view = self.prompts[number]
            seat = self.seats[view.prompt.seat_id]
            cost = prefill * self.promised.input_weight + made * self.promised.output_weight
            view.cost += cost
            view.produced += made
            seat.service += cost
            if made and view.first_token_at is None:
                view.first_token_at = event.at
            seat.largest_cost = max(seat.largest_cost, view.cost)

    def _finish(self, view: PromptView, at: float) -> None:
        seat = self.seats[view.prompt.seat_id]
        view.ended_at = at
        self.kv_in_use -= view.kv_tokens
        self.in_flight -= view.prompt.count
        seat.running -= view.prompt.count
        seat.tickets -= 1
        seat.tokens.add(view.reserved - view.prompt.input_tokens - view.produced, at)
        mean = view.produced / view.prompt.count
        seat.expected += self.promised.output_mean_smoothing * (mean - seat.expected)
        seat.changes += 1
        if view.owed:
            seat.owed_entries += max(view.cost, view.upfront)

    def _leave_queue(self, event: trace.Canceled | trace.Evicted) -> None:
        view = self.prompts[event.number]
        seat = self.seats[view.prompt.seat_id]
        view.ended_at = event.at
        view.outcomes.append("evicted" if isinstance(event, trace.Evicted) else "canceled")
        seat.queue.remove(event.number)
        seat.waiting -= view.prompt.count
        seat.tokens.add(view.reserved, event.at)
        if isinstance(event, trace.Evicted):
            seat.requests.add(view.prompt.count, event.at)
        seat.changes += 1


class Oracle:
    """Sees every event after the view has followed it (`see`), or before (`foresee`)."""

    name = ""

    def foresee(self, event: trace.Event, view: View) -> Iterator[str]:
        """Broken promises that `event` shows, judged by what was so just before it."""
        yield from ()

    def see(self, event: trace.Event, view: View) -> Iterator[str]:
        """Broken promises that show once `event` has happened."""
        yield from ()


class EntryGuarantee(Oracle):
    """A seat whose next request keeps it within its quantity enters at once, whenever feasible."""

    name = "entry guarantee"

    def see(self, event: trace.Event, view: View) -> Iterator[str]:
        if not isinstance(event, trace.Settled):
            return
        owed = [(seat, head) for seat, head in view.heads() if head.count <= seat.unused]
        # An owed prompt that the KV cache cannot hold yet may hold up those behind it.
        if any(view.kv_in_use + view.need(head) > view.kv_tokens for _, head in owed):
            return
        free = view.slots - view.in_flight
        if view.feasible or all(head.count <= free for _, head in owed):
            yield from (f"{seat.terms.seat_id} is owed and waits with prompt {p.number}" for seat, p in owed)


class Reserve(Oracle):
    """Work enters only where there is room, and borrowed work leaves the reserve free."""

    name = "reserve"

    def foresee(self, event: trace.Event, view: View) -> Iterator[str]:
        if not isinstance(event, trace.Entered) or view.in_flight == 0:
            return
        prompt = view.prompts[event.number].prompt
        owed = prompt.count <= view.seats[prompt.seat_id].unused
        if not view.fits(prompt, owed=owed):
            kind = "owed" if owed else "borrowed"
            yield f"{kind} prompt {prompt.number} entered without room"


class WorkConservation(Oracle):
    """Nothing is queued while it could run: at least one of the queued heads does not fit."""

    name = "work conservation"

    def see(self, event: trace.Event, view: View) -> Iterator[str]:
        if not isinstance(event, trace.Settled):
            return
        heads = [head for _, head in view.heads()]
        if heads and (view.in_flight == 0 or all(view.fits(head, owed=False) for head in heads)):
            yield f"{len(heads)} seats wait while {view.slots - view.in_flight} slots are free"


class Order(Oracle):
    """Within a seat, first come is first served, and virtual time never decreases."""

    name = "order"

    def foresee(self, event: trace.Event, view: View) -> Iterator[str]:
        if isinstance(event, trace.Entered):
            queue = view.seats[view.prompts[event.number].prompt.seat_id].queue
            if not queue or queue[0] != event.number:
                yield f"prompt {event.number} entered out of turn"
        if isinstance(event, trace.Settled) and event.virtual_time < view.virtual_time:
            yield f"virtual time fell to {event.virtual_time}"


class OneOutcome(Oracle):
    """Every prompt ends exactly once, the scheduler's own counts agree, and nothing is left behind."""

    name = "one outcome"

    def foresee(self, event: trace.Event, view: View) -> Iterator[str]:
        if isinstance(event, trace.Entered | trace.Canceled | trace.Evicted):
            if view.prompts[event.number].outcomes:
                yield f"prompt {event.number} has a second outcome"
        elif isinstance(event, trace.Ended):
            yield from self._left_behind(event)
            yield from self._counts(event, view)

    @staticmethod
    def _left_behind(event: trace.Ended) -> Iterator[str]:
        if event.in_flight or event.queued:
            yield f"{event.in_flight} in flight and {event.queued} queued after all clients left"
        for seat in event.seats:
            if seat.in_flight or seat.queued:
                yield f"{seat.seat_id} has {seat.in_flight} in flight and {seat.queued} queued at the end"

    @staticmethod
    def _counts(event: trace.Ended, view: View) -> Iterator[str]:
        counts: dict[tuple[str, str], int] = {}
        for prompt in view.prompts.values():
            if len(prompt.outcomes) != 1:
                yield f"prompt {prompt.prompt.number} has outcomes {prompt.outcomes}"
            for outcome in prompt.outcomes:
                key = prompt.prompt.seat_id, outcome
                counts[key] = counts.get(key, 0) + prompt.prompt.count
        for seat in event.seats:
            for outcome, number in seat.outcomes:
                seen = counts.get((seat.seat_id, outcome), 0)
                if number != seen:
                    yield f"{seat.seat_id} counts {number} {outcome}, but it was {seen}"


class Blocks(Oracle):
    """Outside its blocks a seat starts nothing, and nothing of it is queued."""

    name = "blocks"

    def see(self, event: trace.Event, view: View) -> Iterator[str]:
        if isinstance(event, trace.Entered):
            seat = view.seats[view.prompts[event.number].prompt.seat_id]
            if not seat.open:
                yield f"prompt {event.number} entered outside its block"
        elif isinstance(event, trace.Settled):
            for seat in view.seats.values():
                if seat.queue and not seat.open:
                    yield f"{seat.terms.seat_id} has {len(seat.queue)} queued outside its block"


class HonestRefusals(Oracle):
    """Refused only for a reason that holds; admitted only within the limits; a retry on time is admitted."""

    name = "honest refusals"

    def __init__(self) -> None:
        self._promised_retries: dict[tuple[float, str, tuple[tuple[int, int, int], ...]], int] = {}
        """By time of the retry, seat and sizes: the seat's change count at the refusal."""

    def foresee(self, event: trace.Event, view: View) -> Iterator[str]:
        match event:
            case trace.Refused():
                yield from self._refusal(event, view)
            case trace.Queued():
                reasons = self._reasons(event.seat_id, event.prompts, event.at, view)
                if reasons:
                    yield f"admitted although {sorted(reasons)}"
            case trace.Evicted():
                yield from self._eviction(event, view)

    def _refusal(self, event: trace.Refused, view: View) -> Iterator[str]:
        reasons = self._reasons(event.seat_id, event.prompts, event.at, view)
        if event.reason not in reasons:
            yield f"{event.seat_id} refused for {event.reason}, true would be {sorted(reasons)}"
        seat = view.seats[event.seat_id]
        sizes = tuple((p.input_tokens, p.max_tokens, p.count) for p in event.prompts)
        promised = self._promised_retries.pop((event.at, event.seat_id, sizes), None)
        if promised == seat.changes:
            yield f"{event.seat_id} came back on time and was refused for {event.reason}"
        limits = {"request_limit", "token_limit"}
        if reasons and reasons <= limits:
            if event.retry_after_s is None:
                yield f"{event.seat_id} hit {event.reason} and was not told when to retry"
            else:
                needed = self._wait_s(seat, event.prompts, view)
                if abs(event.retry_after_s - needed) > EPSILON * 60:
                    yield f"{event.seat_id} told to wait {event.retry_after_s} s, it takes {needed} s"
                retry_at = event.at + event.retry_after_s
                self._promised_retries[retry_at, event.seat_id, sizes] = seat.changes

    @staticmethod
    def _wait_s(seat: SeatView, prompts: Sequence[trace.Prompt], view: View) -> float:
        """Seconds until both limits would admit the request."""
        count = sum(prompt.count for prompt in prompts)
        tokens = view.reservation(prompts, seat.terms.tpm_limit)
        return max(
            (count - seat.requests.level) * 60.0 / seat.terms.rpm_limit,
            (tokens - seat.tokens.level) * 60.0 / seat.terms.tpm_limit,
        )

    @staticmethod
    def _eviction(event: trace.Evicted, view: View) -> Iterator[str]:
        prompt = view.prompts[event.number]
        waited = event.at - prompt.submitted_at
        if event.reason == "queue_timeout" and waited < view.promised.queue_timeout_s - EPSILON:
            yield f"prompt {event.number} timed out after {waited} s"
        if event.reason == "outside_block" and view.seats[prompt.prompt.seat_id].open:
            yield f"prompt {event.number} evicted inside its block"

    @staticmethod
    def _reasons(seat_id: str, prompts: Sequence[trace.Prompt], at: float, view: View) -> set[str]:
        """Every reason for which the request may be refused."""
        seat = view.seats[seat_id]
        terms = seat.terms
        count = sum(prompt.count for prompt in prompts)
        bound = view.promised.max_queued_per_seat * terms.quantity
        seat.requests.add(0, at)
        seat.tokens.add(0, at)
        borrowed_slots = view.slots - int(view.slots * view.promised.max_reserve_share)
        tokens = view.reservation(prompts, terms.tpm_limit)
        holds = {
            "outside_block": not seat.open,
            "too_wide": max(prompt.count for prompt in prompts) > borrowed_slots,
            "too_many": count > terms.rpm_limit,
            "over_queue": count > bound,
            "too_large": sum(prompt.input_tokens + prompt.count for prompt in prompts) > terms.tpm_limit,
            "queue_full": seat.waiting + count > bound,
            "request_limit": seat.requests.level < count - EPSILON * terms.rpm_limit,
            "token_limit": seat.tokens.level < tokens - EPSILON * terms.tpm_limit,
        }
        return {reason for reason, true in holds.items() if true}


class QueueTimeout(Oracle):
    """Nothing waits longer than the queue timeout."""

    name = "queue timeout"

    def see(self, event: trace.Event, view: View) -> Iterator[str]:
        if not isinstance(event, trace.Settled):
            return
        for _, head in view.heads():
            waited = event.at - view.prompts[head.number].submitted_at
            if waited > view.promised.queue_timeout_s + EPSILON:
                yield f"prompt {head.number} has waited {waited} s"


@dataclass(slots=True)
class _Pair:
    """The lead of one seat over another while both are backlogged, in cost by weight."""

    since: float = 0.0
    backlogged: bool = False
    lowest: float = 0.0
    highest: float = 0.0
    widest: float = 0.0


class Fairness(Oracle):
    """Over any interval in which two seats are backlogged their services differ by a constant."""

    name = "fairness"

    def __init__(self) -> None:
        self._pairs: dict[tuple[str, str], _Pair] = {}

    def see(self, event: trace.Event, view: View) -> Iterator[str]:
        if isinstance(event, trace.Ended):
            yield from self._verdict(view)
        if not isinstance(event, trace.Settled):
            return
        for first, second in combinations(view.seats, 2):
            f, g = view.seats[first], view.seats[second]
            pair = self._pairs.get((first, second))
            if not f.queue or not g.queue:
                if pair is not None:
                    pair.backlogged = False
                continue
            if pair is None:
                pair = self._pairs[first, second] = _Pair()
            lead = f.service / f.terms.quantity - g.service / g.terms.quantity
            if not pair.backlogged:
                pair.backlogged, pair.lowest, pair.highest = True, lead, lead
            pair.lowest, pair.highest = min(pair.lowest, lead), max(pair.highest, lead)
            pair.widest = max(pair.widest, pair.highest - pair.lowest)

    def _verdict(self, view: View) -> Iterator[str]:
        for (first, second), pair in self._pairs.items():
            bound = fairness_bound(view.seats[first]) + fairness_bound(view.seats[second])
            if pair.widest > bound + EPSILON * bound:
                yield f"{first} and {second} differ by {pair.widest:.0f}, bound {bound:.0f}"

    def widest(self) -> dict[tuple[str, str], float]:
        """The widest gap of each pair, in cost by weight."""
        return {names: pair.widest for names, pair in self._pairs.items()}


def fairness_bound(seat: SeatView) -> float:
    """One seat's part of the bound between two: `(2 D c + G) / w`, cost by weight."""
    return (2 * seat.most_tickets * seat.largest_cost + seat.owed_entries) / seat.terms.quantity


class LedgerTruth(Oracle):
    """The ledger's totals are those of an integration over the trace, token by token and span by span."""

    name = "ledger"

    def __init__(self) -> None:
        self._blocks: dict[str, list[tuple[float, float]]] = {}
        self._opened: dict[str, float] = {}

    def see(self, event: trace.Event, view: View) -> Iterator[str]:
        match event:
            case trace.SeatOpened():
                self._opened[event.seat_id] = event.at
            case trace.SeatClosed():
                block = (self._opened.pop(event.seat_id), event.at)
                self._blocks.setdefault(event.seat_id, []).append(block)
            case trace.Ended():
                for seat_id, opened in self._opened.items():
                    self._blocks.setdefault(seat_id, []).append((opened, event.at))
                for totals in event.seats:
                    yield from self._compare(totals, view, event.at)

    def _compare(self, totals: trace.SeatTotals, view: View, end: float) -> Iterator[str]:
        prompts = [p for p in view.prompts.values() if p.prompt.seat_id == totals.seat_id]
        delivered = sum(prompt.produced for prompt in prompts)
        if delivered != totals.delivered_tokens:
            yield f"{totals.seat_id} shows {totals.delivered_tokens} delivered, the engine made {delivered}"
        terms = view.seats[totals.seat_id].terms
        marks: list[tuple[float, int]] = []
        for prompt in prompts:
            if prompt.outcomes == ["rejected"]:
                continue
            start = owing_since(prompt, terms, view.promised)
            stop = end if prompt.ended_at is None else prompt.ended_at
            for opened, closed in self._blocks[totals.seat_id]:
                if max(start, opened) < min(stop, closed):
                    marks.append((max(start, opened), prompt.prompt.count))
                    marks.append((min(stop, closed), -prompt.prompt.count))
        owed = integrate(marks, terms.quantity) * terms.guarantee_tok_s
        if abs(owed - totals.owed_tokens) > EPSILON * max(1.0, owed):
            yield f"{totals.seat_id} shows {totals.owed_tokens} owed, it was {owed}"


def owing_since(prompt: PromptView, terms: trace.SeatOpened, promised: Promised) -> float:
    """When a prompt began to be owed its rate: at its first token, or when that was due."""
    reading_s = prompt.prompt.input_tokens / terms.prefill_tok_s
    due = prompt.submitted_at + promised.first_token_grace_s + reading_s
    return due if prompt.first_token_at is None else min(due, prompt.first_token_at)


def integrate(marks: list[tuple[float, int]], most: int) -> float:
    """Seconds times requests, at most `most` of them at a time; a mark is a time and a change."""
    total, owing, since = 0.0, 0, 0.0
    for at, change in sorted(marks):
        total += min(owing, most) * (at - since)
        owing, since = owing + change, at
    return total


def all_oracles() -> list[Oracle]:
    return [
        EntryGuarantee(),
        Reserve(),
        WorkConservation(),
        Order(),
        OneOutcome(),
        Blocks(),
        HonestRefusals(),
        QueueTimeout(),
        Fairness(),
        LedgerTruth(),
    ]


def violations(events: Sequence[trace.Event], promised: Promised | None = None) -> list[str]:
    """The promises that a trace breaks, one line each, in order; at most the first few."""
    view = View(promised or Promised())
    oracles = all_oracles()
    broken: list[str] = []
    for event in events:
        for oracle in oracles:
            broken += (f"{oracle.name}: {line}" for line in oracle.foresee(event, view))
        view.follow(event)
        for oracle in oracles:
            broken += (f"{oracle.name}: {line}" for line in oracle.see(event, view))
        if len(broken) >= MOST_REPORTED:
            break
    return broken


def service(events: Sequence[trace.Event], since_s: float, until_s: float) -> dict[str, float]:
    """Cost that the engine worked for each seat between two times."""
    view = View(Promised())
    before: dict[str, float] = {}
    for event in events:
        if event.at > until_s:
            break
        if event.at <= since_s:
            before = {}
        view.follow(event)
        if event.at <= since_s:
            before = {seat_id: seat.service for seat_id, seat in view.seats.items()}
    return {seat_id: seat.service - before.get(seat_id, 0.0) for seat_id, seat in view.seats.items()}
