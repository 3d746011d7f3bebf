"""Who enters, and when: the guarantee, the room, and that nobody waits in vain."""

from __future__ import annotations

import math
from collections.abc import Iterator

from benchmarks.simulator import trace
from benchmarks.simulator.oracles.oracle import Oracle
from benchmarks.simulator.oracles.view import EASY, View

NEEDLESS_S = 0.5
"""Borrowed work may be kept out for this long after the reason for it has gone, also once all work that was
owed a pace has left,"""
DOUBLING_S = 0.15
"""or for as long as it takes to fill the slots from one, when what may enter doubles in this time, and a step
longer: entry opens between steps."""


class EntryGuarantee(Oracle):
    """A seat whose next request keeps it within its quantity enters at once, whatever is in the engine."""

    name = "entry guarantee"
    sees = (trace.Settled,)

    def see(self, event: trace.Event, view: View) -> Iterator[str]:
        if not isinstance(event, trace.Settled):
            return
        owed = [(seat, head) for seat, head in view.heads() if head.count <= seat.unused]
        # An owed prompt for which owed work leaves no room may hold up those behind it.
        if all(view.fits(head, owed=True) for _, head in owed):
            yield from (f"{seat.terms.seat_id} is owed and waits with prompt {p.number}" for seat, p in owed)


class Room(Oracle):
    """Work enters only where there is room: borrowed work beside all, owed work beside what is owed."""

    name = "room"
    foresees = (trace.Entered,)

    def foresee(self, event: trace.Event, view: View) -> Iterator[str]:
        if not isinstance(event, trace.Entered) or view.in_flight == 0:
            return
        prompt = view.prompts[event.number].prompt
        owed = prompt.count <= view.seats[prompt.seat_id].unused
        if not view.fits(prompt, owed=owed, beyond=view.elastic(event.at)):
            kind = "owed" if owed else "borrowed"
            yield f"{kind} prompt {prompt.number} entered without room"


class WorkConservation(Oracle):
    """Nothing is queued while it could run: some queued head does not fit, or would endanger a pace."""

    name = "work conservation"
    sees = (trace.Settled,)

    def __init__(self) -> None:
        self._owed_at = -math.inf
        """When a guaranteed seat last had work in the engine."""
        self._since: float | None = None
        """Since when borrowed work is kept out without need."""

    def see(self, event: trace.Event, view: View) -> Iterator[str]:
        if not isinstance(event, trace.Settled):
            return
        pace_s = view.pace_s()
        if pace_s is not None:
            self._owed_at = event.at
        heads = [head for _, head in view.heads()]
        spare = min(0, view.elastic(event.at))
        needless = heads and (
            view.in_flight == 0 or all(view.fits(head, owed=False, beyond=spare) for head in heads)
        )
        if not needless or self._in_danger(heads, pace_s, view):
            self._since = None
            return
        self._since = event.at if self._since is None else self._since
        opening_s = max(NEEDLESS_S, DOUBLING_S * math.log2(view.slots) + view.full_step_s(heads))
        limited = event.at - self._owed_at < opening_s and view.in_flight > 0
        if not limited or event.at - self._since > opening_s:
            yield f"{len(heads)} seats wait while {view.slots - view.in_flight} slots are free"

    @staticmethod
    def _in_danger(heads: list[trace.Prompt], pace_s: float | None, view: View) -> bool:
        if pace_s is None:
            return False
        return bool(view.held) or view.full_step_s(heads) > EASY * pace_s
