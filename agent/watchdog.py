"""When serving is restarted, and how soon. Pure: the time is passed in.

A restart cuts every stream of a node, so it takes certainty. Both watchdogs count only time during
which the agent itself was looking: after a machine slept, or the agent was stopped, a long gap
between two looks says nothing about serving.
"""

from __future__ import annotations

from contract.reports import ThroughputReport

LONGEST_LOOK_S = 10.0
"""A gap between two looks counts as this much at most."""


class Backoff:
    """Delays that double from `first_s` up to `most_s`."""

    def __init__(self, first_s: float, most_s: float) -> None:
        self._first_s = first_s
        self._most_s = most_s
        self._next_s = first_s

    def next_s(self) -> float:
        """The delay before the next try."""
        delay = self._next_s
        self._next_s = min(2 * delay, self._most_s)
        return delay

    def reset(self) -> None:
        """Begin again with the first delay."""
        self._next_s = self._first_s


class Silence:
    """Serving that has been ready, and whose stats port has not answered for `limit_s`.

    Serving that loads its model is silent too, for as long as that takes.
    """

    def __init__(self, limit_s: float, *, was_ready: bool) -> None:
        self._limit_s = limit_s
        self._was_ready = was_ready
        self._spell = _Spell()

    def observe(self, *, answered: bool, ready: bool, now: float) -> bool:
        """Whether it has been silent for too long."""
        self._was_ready |= ready
        return self._spell.look(self._was_ready and not answered, now) >= self._limit_s


class Stall:
    """Work in flight, and not one output token from the engine for `limit_s`.

    Only tokens prove that the engine moves: owed tokens grow with the clock, and the counts of requests
    with clients that come and give up.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._output_tokens = -1
        self._spell = _Spell()

    def observe(self, report: ThroughputReport, now: float) -> bool:
        """Whether it has stood still for too long."""
        output_tokens = sum(seat.output_tokens for seat in report.seats)
        in_flight = sum(seat.in_flight for seat in report.seats)
        stands = in_flight > 0 and output_tokens == self._output_tokens
        self._output_tokens = output_tokens
        return self._spell.look(stands, now) >= self._limit_s


class _Spell:
    """For how long something has lasted without a break, as far as it was seen."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._looked_at: float | None = None

    def look(self, lasts: bool, now: float) -> float:
        gap = 0.0 if self._looked_at is None else min(now - self._looked_at, LONGEST_LOOK_S)
        self._looked_at = now
        self._seconds = self._seconds + gap if lasts else 0.0
        return self._seconds
