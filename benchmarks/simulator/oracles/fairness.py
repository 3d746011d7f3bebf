"""Bounded unfairness between any two seats while both are backlogged."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

from benchmarks.simulator import trace
from benchmarks.simulator.oracles.oracle import Oracle
from benchmarks.simulator.oracles.view import EPSILON, SeatView, View


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
    sees = (
        trace.Ended,
        trace.Settled,
    )

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
