"""Order, and one outcome for each prompt."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.simulator import trace
from benchmarks.simulator.oracles.oracle import Oracle
from benchmarks.simulator.oracles.view import View


class Order(Oracle):
    """Within a seat, first come is first served, and virtual time never decreases."""

    name = "order"
    foresees = (
        trace.Entered,
        trace.Settled,
    )

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
    foresees = (
        trace.Entered,
        trace.Canceled,
        trace.Evicted,
        trace.Ended,
    )

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
    sees = (
        trace.Entered,
        trace.Settled,
    )

    def see(self, event: trace.Event, view: View) -> Iterator[str]:
        if isinstance(event, trace.Entered):
            seat = view.seats[view.prompts[event.number].prompt.seat_id]
            if not seat.open:
                yield f"prompt {event.number} entered outside its block"
        elif isinstance(event, trace.Settled):
            for seat in view.seats.values():
                if seat.queue and not seat.open:
                    yield f"{seat.terms.seat_id} has {len(seat.queue)} queued outside its block"
