"""How long one decision of admission takes, with many seats and a long queue."""

from __future__ import annotations

import gc
import time

from scheduler import Admission, Ask, Capacity, SeatTerms

SEATS = 1_000
QUEUED_PER_SEAT = 10
SLOTS = 256
GUARANTEES = {"owed": 50.0, "borrowed": 0.0}
"""What each seat is guaranteed, tokens per second, by which stage then finds the next request."""
_UNLIMITED = 1_000_000_000


def decision_times(decisions: int, guarantee_tok_s: float) -> list[float]:
    """Seconds of each decision, in ascending order: a request ends, and whoever is next enters.

    1,000 seats of quantity 1 to 3, each with 10 requests queued; what enters is replaced, so that the queue
    stays at 10,000.
    """
    admission = _crowded(guarantee_tok_s)
    running = admission.dispatch(0.0)
    took = []
    gc.collect()
    for number in range(decisions):
        now = 1.0 + number * 1e-3
        ticket = running.pop(0)
        ticket_seat = ticket.seat.terms.seat_id
        begin = time.perf_counter()
        admission.record_step([(ticket, 1 + number % 200)], now)
        admission.release(ticket, now)
        entered = admission.dispatch(now)
        took.append(time.perf_counter() - begin)
        running += entered
        for other in entered:
            admission.submit(other.seat.terms.seat_id, [_ask(number)], now)
        assert running, f"{ticket_seat} left and nobody entered"
    return sorted(took)


def _crowded(guarantee_tok_s: float) -> Admission:
    admission = Admission(Capacity(SLOTS, _UNLIMITED))
    for number in range(SEATS):
        terms = SeatTerms(f"seat{number}", 1 + number % 3, guarantee_tok_s, 2_000.0, _UNLIMITED, _UNLIMITED)
        admission.open_seat(terms, 0.0)
        admission.submit(terms.seat_id, [_ask(number)] * QUEUED_PER_SEAT, 0.0)
    return admission


def _ask(number: int) -> Ask:
    return Ask(50 + number % 70, 100)
