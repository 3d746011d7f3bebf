"""Tickets: one request's way through admission, as a table of states; and why a request was refused.

    submit -> QUEUED -> RUNNING -> FINISHED
                 |-> EVICTED   (queue timeout, block end, drain)
                 |-> CANCELED  (its client left)

A request that is refused at `submit` gets a `Refusal` and never becomes a ticket.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from scheduler.seats import Seat


class State(enum.Enum):
    QUEUED = "queued"
    RUNNING = "running"
    FINISHED = "finished"
    EVICTED = "evicted"
    CANCELED = "canceled"


class Event(enum.Enum):
    DISPATCH = "dispatch"
    FINISH = "finish"
    EVICT = "evict"
    CANCEL = "cancel"


TRANSITIONS: dict[tuple[State, Event], State] = {
    (State.QUEUED, Event.DISPATCH): State.RUNNING,
    (State.QUEUED, Event.EVICT): State.EVICTED,
    (State.QUEUED, Event.CANCEL): State.CANCELED,
    (State.RUNNING, Event.FINISH): State.FINISHED,
}
"""Every pair that is not here is a bug in the caller, and raises."""

ENDED = frozenset({State.FINISHED, State.EVICTED, State.CANCELED})


class Outcome(enum.Enum):
    """How a request left admission; each request has exactly one."""

    DISPATCHED = "dispatched"
    REJECTED = "rejected"
    EVICTED = "evicted"
    CANCELED = "canceled"


class Reason(enum.Enum):
    """Why a request was rejected or evicted."""

    REQUEST_LIMIT = "request_limit"
    TOKEN_LIMIT = "token_limit"
    TOO_LARGE = "too_large"
    """More tokens than the token limit holds."""
    TOO_MANY = "too_many"
    """More prompts times `n` than the request limit holds."""
    OVER_QUEUE = "over_queue"
    """More prompts times `n` than the queue holds."""
    TOO_WIDE = "too_wide"
    """A larger `n` than the engine can always run together."""
    QUEUE_FULL = "queue_full"
    QUEUE_TIMEOUT = "queue_timeout"
    OUTSIDE_BLOCK = "outside_block"
    SUSPENDED = "suspended"
    REVOKED = "revoked"
    DRAINING = "draining"


@dataclass(frozen=True, slots=True)
class Refusal:
    """A request that may not run, with the figures its client needs to do better."""

    reason: Reason
    retry_after_s: float | None = None
    """Seconds after which the same request would be admitted; None if it never would."""
    limit: int = 0
    used: int = 0
    requested: int = 0
    """The limit that was hit, what was in use, and what was asked for, in the limit's own unit."""


class Ticket:
    """One admitted prompt. Read its fields freely; only `Admission` writes them."""

    __slots__ = (
        "cached_tokens",
        "charged_output",
        "count",
        "deadline",
        "dispatched_at",
        "expected_output",
        "expires_at",
        "first_token_at",
        "input_tokens",
        "kv_tokens",
        "lifts",
        "max_tokens",
        "number",
        "owed_kv_tokens",
        "produced",
        "refusal",
        "reserved_tokens",
        "seat",
        "state",
        "submitted_at",
        "weight",
    )

    def __init__(
        self,
        number: int,
        seat: Seat,
        *,
        input_tokens: int,
        max_tokens: int,
        count: int,
        submitted_at: float,
        deadline: float,
        expires_at: float,
    ) -> None:
        self.number = number
        self.seat = seat
        self.input_tokens = input_tokens
        self.max_tokens = max_tokens
        self.count = count
        self.submitted_at = submitted_at
        self.deadline = deadline
        """By when its first token should come: among those that enter under the guarantee the earliest is
        first."""
        self.expires_at = expires_at
        """When it is evicted if it is still queued."""
        self.state = State.QUEUED
        self.refusal: Refusal | None = None
        self.dispatched_at: float | None = None
        self.first_token_at: float | None = None
        self.expected_output = 0
        """Output tokens over all sequences, as expected at dispatch."""
        self.charged_output = 0
        """Output tokens charged so far to virtual time."""
        self.lifts = 0
        """The seat's `lifts` at dispatch: a refund counts only until the next one."""
        self.cached_tokens = 0
        self.kv_tokens = 0
        """KV cache set aside for it while it runs."""
        self.owed_kv_tokens = 0
        """The same if it entered as owed work and its seat's block is open, else 0."""
        self.weight = 1.0
        """The seat's weight at dispatch: what was charged at it is refunded at it."""
        self.produced = 0
        """Output tokens the engine has made, over all sequences."""
        self.reserved_tokens = 0
        """Held in the token bucket until the ticket ends."""

    def __repr__(self) -> str:
        return f"<Ticket {self.number} of {self.seat.terms.seat_id} {self.state.value}>"

    @property
    def due(self) -> float:
        """When its first token is due. Never, with several sequences: they wait for as many seats, and are
        owed from their first token on only."""
        return self.deadline if self.count == 1 else math.inf

    @property
    def ended(self) -> bool:
        return self.state in ENDED

    def apply(self, event: Event) -> None:
        """Move along the table; a move that is not in it is a bug and raises."""
        try:
            self.state = TRANSITIONS[self.state, event]
        except KeyError:
            raise RuntimeError(f"{self!r} cannot {event.value}") from None
