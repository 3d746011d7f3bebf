"""What admission knows of each seat, and the heap in which it finds the seat whose turn it is."""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from scheduler.buckets import TokenBucket
from scheduler.ledger import Ledger
from scheduler.terms import Policy, SeatTerms
from scheduler.tickets import Outcome, Reason, Ticket


class Seat:
    """One pledge's place in admission. Only `Admission` writes it.

    Invariants: `in_flight` is the number of sequences of its running tickets; `tag` is finite and a
    queued seat's tag is at least `joined_at`.
    """

    def __init__(self, terms: SeatTerms, policy: Policy, now: float) -> None:
        self.terms = terms
        self.closed: Reason | None = None
        self.queue: OrderedDict[int, Ticket] = OrderedDict()
        self.waiting = 0
        """Sequences of the queued tickets."""
        self.in_flight = 0
        self.owed_tickets: dict[int, Ticket] = {}
        """Those in the engine that entered as owed work."""
        self.tag = 0.0
        self.joined_at = 0.0
        """Virtual time when its queue was last empty and a request came."""
        self.lifts = 0
        """How often it came back behind the virtual time and was lifted to it."""
        self.read_by = now
        """When its prompts so far would be read at the rate of its seats."""
        self.unread = 0
        """Tickets that have not ended and have no first token yet."""
        self.expected_output = policy.initial_output_tokens
        self.requests = TokenBucket(terms.rpm_limit, now)
        self.tokens = TokenBucket(terms.tpm_limit, now)
        self.ledger = Ledger(terms.guarantee_tok_s, terms.quantity, now)
        self.outcomes: dict[Outcome, int] = dict.fromkeys(Outcome, 0)
        self.input_tokens = 0
        self.cached_tokens = 0
        self.last_dispatch: float | None = None
        self.dispatch_gap_s = 1.0

    @property
    def head(self) -> Ticket:
        """The ticket that is next; there must be one."""
        return next(iter(self.queue.values()))

    @property
    def backlogged(self) -> bool:
        return bool(self.queue)

    @property
    def head_owed(self) -> bool:
        """Whether the next ticket keeps the seat within its quantity."""
        return bool(self.queue) and self.head.count <= self.unused

    @property
    def guaranteed(self) -> bool:
        return self.closed is None and self.terms.guarantee_tok_s > 0

    @property
    def unused(self) -> int:
        """Sequences it may still start at once under its guarantee."""
        return max(0, self.terms.quantity - self.in_flight) if self.guaranteed else 0

    @property
    def owed(self) -> int:
        """Sequences in the engine that count as owed."""
        return min(self.terms.quantity, self.in_flight) if self.guaranteed else 0

    def expected(self, sequences: int, max_tokens: int) -> int:
        """Output tokens of so many sequences together, by its running mean: whole, so that sums are exact."""
        return sequences * min(math.ceil(self.expected_output), max_tokens)


@dataclass(frozen=True, slots=True)
class SeatReading:
    """What one seat looks like from outside, at one moment; counters are cumulative."""

    seat_id: str
    queued: int
    in_flight: int
    requests: dict[str, int]
    """Finished decisions by outcome."""
    input_tokens: int
    cached_tokens: int
    output_tokens: int
    owed_tokens: float
    borrowed_tokens: float
    behind_tokens: float
    shortfall_tokens: float
    owed_seconds: int
    """Whole seconds throughout which something was owed."""
    missed_seconds: int
    """Of these, those that got less than 95 % of it."""
    attainment: dict[int, float | None]
    """By window length in seconds; None where nothing was owed."""
    virtual_time: float


@dataclass(frozen=True, slots=True)
class LimitReading:
    """One limit of a seat, as the providers' headers show it."""

    limit: int
    remaining: int
    reset_s: float


class SeatHeap:
    """A heap of seats whose keys change under it.

    A seat is pushed whenever its key may have fallen; entries whose key has since risen are put back
    when they come up, and entries of seats that no longer belong here are dropped. Holds at most twice as
    many entries as seats, plus a few.
    """

    def __init__(self, key: Callable[[Seat], float], belongs: Callable[[Seat], bool]) -> None:
        self._key = key
        self._belongs = belongs
        self._entries: list[tuple[float, int, Seat]] = []
        self._best: dict[Seat, float] = {}
        self._pushes = 0

    def push(self, seat: Seat) -> None:
        key = self._key(seat)
        if self._best.get(seat, float("inf")) <= key:
            return
        self._best[seat] = key
        self._pushes += 1
        heapq.heappush(self._entries, (key, self._pushes, seat))
        if len(self._entries) > 2 * len(self._best) + 64:
            self._entries = [entry for entry in self._entries if self._best.get(entry[2]) == entry[0]]
            heapq.heapify(self._entries)

    def peek(self) -> Seat | None:
        """The seat that belongs here and has the lowest key; it stays."""
        while self._entries:
            key, _, seat = self._entries[0]
            if self._best.get(seat) != key:
                heapq.heappop(self._entries)
            elif not self._belongs(seat):
                heapq.heappop(self._entries)
                del self._best[seat]
            elif self._key(seat) > key:
                heapq.heappop(self._entries)
                del self._best[seat]
                self.push(seat)
            else:
                return seat
        return None
