"""The rate guarantee: delivered tokens never lag far behind what is owed."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.simulator import trace
from benchmarks.simulator.oracles.ledger import owing_since
from benchmarks.simulator.oracles.oracle import Oracle
from benchmarks.simulator.oracles.view import View

MARGIN = 0.1
"""Share of the machine that a feasible set of guarantees leaves free."""

KEPT = 0.5
"""Share of the lag that is promised which is allowed here: a scheduler that comes near the promise in some
thousand runs breaks it in more."""

Mark = tuple[float, int, int]
"""When; how many more sequences are owed their rate; tokens delivered."""


class Pace(Oracle):
    """In every busy period `delivered >= owed - g*q*T0`, with some to spare, if the guarantees were feasible
    throughout."""

    name = "pace"
    sees = (
        trace.SeatOpened,
        trace.SeatClosed,
        trace.MachineChanged,
        trace.CapacityChanged,
        trace.Stepped,
        trace.Ended,
    )

    def __init__(self) -> None:
        self.feasible = True
        self.judged = 0
        """Seats that were served, had a guarantee which could be kept, and did not ask for more at once than
        they have."""
        self._delivered: dict[str, list[Mark]] = {}
        self._opened: dict[str, float] = {}
        self._blocks: dict[str, list[tuple[float, float]]] = {}

    def see(self, event: trace.Event, view: View) -> Iterator[str]:
        match event:
            case trace.SeatOpened():
                self._opened[event.seat_id] = event.at
                self.feasible = self.feasible and feasible(view)
            case trace.SeatClosed():
                self._close(event.seat_id, event.at)
            case trace.MachineChanged() | trace.CapacityChanged():
                self.feasible = self.feasible and feasible(view)
            case trace.Stepped():
                for number, _, made in event.work:
                    seat_id = view.prompts[number].prompt.seat_id
                    self._delivered.setdefault(seat_id, []).append((event.at, 0, made))
            case trace.Ended():
                # Which prompts there would be is known only now.
                if self.feasible and feasible(view):
                    for seat_id in list(self._opened):
                        self._close(seat_id, event.at)
                    for seat_id in view.seats:
                        if not sent_wide(seat_id, view):
                            yield from self._judge(seat_id, view)

    def _close(self, seat_id: str, at: float) -> None:
        self._blocks.setdefault(seat_id, []).append((self._opened.pop(seat_id), at))

    def _judge(self, seat_id: str, view: View) -> Iterator[str]:
        terms = view.seats[seat_id].terms
        self.judged += terms.guarantee_tok_s > 0 and seat_id in self._delivered
        worst = 0.0
        for opened, closed in self._blocks[seat_id]:
            worst = max(worst, self._worst_lag(seat_id, opened, closed, view))
        allowed = KEPT * terms.guarantee_tok_s * terms.quantity * view.promised.first_token_grace_s
        if worst > allowed + 1.0:
            yield f"{seat_id} was {worst:.1f} tokens behind, {allowed:.1f} are allowed"

    def _worst_lag(self, seat_id: str, opened: float, closed: float, view: View) -> float:
        """The most tokens owed and not delivered at any moment of the block's busy periods."""
        terms = view.seats[seat_id].terms
        marks = [mark for mark in self._delivered.get(seat_id, []) if opened <= mark[0] < closed]
        for prompt in view.prompts.values():
            if prompt.prompt.seat_id != seat_id or prompt.outcomes == ["rejected"]:
                continue
            start = max(opened, owing_since(prompt))
            stop = closed if prompt.ended_at is None else min(closed, prompt.ended_at)
            if start < stop:
                marks += [(start, prompt.prompt.count, 0), (stop, -prompt.prompt.count, 0)]
        return worst_lag(marks, terms.guarantee_tok_s, terms.quantity)


def worst_lag(marks: list[Mark], guarantee_tok_s: float, quantity: int) -> float:
    """The largest `owed - delivered` of all busy periods; it is 0 at the beginning of each."""
    worst = lag = since = 0.0
    owing = 0
    # Of one moment, first the tokens, then who begins, then who ends.
    for at, change, tokens in sorted(marks, key=lambda mark: (mark[0], -mark[2], -mark[1])):
        lag += guarantee_tok_s * min(owing, quantity) * (at - since)
        worst = max(worst, lag)
        since, owing = at, owing + change
        lag = lag - tokens if owing else 0.0
    return worst


def sent_wide(seat_id: str, view: View) -> bool:
    """Whether the seat asked for more sequences at once than it has seats: such a request is borrowed, and
    those behind it wait for it."""
    seat = view.seats[seat_id]
    return any(view.prompts[number].prompt.count > seat.terms.quantity for number in seat.numbers)


def feasible(view: View) -> bool:
    """Whether all guarantees sold can be kept together, by the law that the machine runs by."""
    sold = [s for s in view.seats.values() if s.open and s.terms.guarantee_tok_s > 0]
    if not sold or view.step_time is None:
        return True
    pace_s = min(1 / seat.terms.guarantee_tok_s for seat in sold)
    streams = sum(seat.terms.quantity for seat in sold)
    kv_tokens = sum(seat.terms.quantity * _longest(seat.terms.seat_id, view) for seat in sold)
    prompt_tok_s = sum(
        min(seat.terms.tpm_limit / 60, seat.terms.quantity * seat.terms.prefill_tok_s) for seat in sold
    )
    # A step that takes fewer prompt tokens than come in its pace has to be shorter by as much.
    prompt_tokens = min(prompt_tok_s * pace_s, view.step_tokens - streams)
    allowed_s = min(pace_s, prompt_tokens / prompt_tok_s) if prompt_tok_s else pace_s
    fits = streams <= min(view.slots, view.step_tokens) and kv_tokens <= view.kv_tokens
    seconds = view.step_time.seconds(prompt_tokens, streams, kv_tokens) * view.slowdown
    return fits and seconds <= (1 - MARGIN) * allowed_s


def _longest(seat_id: str, view: View) -> int:
    """The most KV tokens that one sequence of the seat may hold, by the prompts so far."""
    return max(
        (
            view.prompts[number].prompt.input_tokens + view.prompts[number].prompt.max_tokens
            for number in view.seats[seat_id].numbers
        ),
        default=0,
    )
