"""The order in which borrowed decodes take part: seats by virtual time, the sequences of a seat by turns."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heapify, heappop, heappush
from itertools import islice
from operator import attrgetter

from scheduler.streams import StepSeat, Stream

_LAST_CHANGE = attrgetter("turn")
_PLACE = attrgetter("place")
_Held = tuple[float, int, int, Stream]
"""Its seat's tag, the step in which it was held, and its place: the least has been held longest."""


class Order:
    """The order of the last review, and behind it the decodes that came since: who is next between reviews.

    Invariant: while a seat has held decodes its tag does not change between reviews.
    """

    def __init__(self, ordered: Sequence[Stream] = ()) -> None:
        self._places = {stream: place for place, stream in enumerate(ordered)}
        self._next_place = len(ordered)
        self._held: list[_Held] = []
        """A heap of those that are held and of some that left; empty until one is asked for."""

    def append(self, stream: Stream) -> None:
        """It decodes from now on."""
        self._places[stream] = self._next_place
        self._next_place += 1

    def drop(self, stream: Stream) -> None:
        """It decodes no more."""
        self._places.pop(stream, None)

    def last(self, count: int) -> list[Stream]:
        """The last that take part, for the caller to hold at once."""
        return list(islice((each for each in reversed(self._places) if not each.held), count))

    def note_held(self, stream: Stream) -> None:
        """It was held since the review."""
        if self._held:
            heappush(self._held, self._entry(stream))

    def longest_held(self, count: int) -> list[Stream]:
        """Those that have been held longest, for the caller to release at once.

        Not the first in the order: the review that made it may have held them after their turn.
        """
        if not self._held:
            self._held = [self._entry(stream) for stream in self._places if stream.held]
            heapify(self._held)
        released: list[Stream] = []
        while self._held and len(released) < count:
            _, _, place, stream = heappop(self._held)
            if self._places.get(stream) == place:
                released.append(stream)
        return released

    def _entry(self, stream: Stream) -> _Held:
        return (stream.seat.tag, stream.turn, self._places[stream], stream)


def in_order(borrowed: list[Stream], virtual: float, step: int, turn_steps: int) -> list[Stream]:
    """Lowest virtual time first, as it will be when all that come before have had a turn.

    `borrowed`: oldest first. `virtual`: of the seats that lack something; the others are lifted to it.
    """
    by_seat: dict[StepSeat, list[Stream]] = {}
    for stream in borrowed:
        by_seat.setdefault(stream.seat, []).append(stream)
    for seat, streams in by_seat.items():
        if not seat.held:
            seat.tag = max(seat.tag, virtual)
        ordered = _by_turn(streams, step)
        if len(by_seat) == 1:
            return ordered
        turn = turn_steps / seat.weight
        for place, stream in enumerate(ordered):
            stream.place = seat.tag + place * turn
    return sorted(borrowed, key=_PLACE)


def _by_turn(streams: list[Stream], step: int) -> list[Stream]:
    """The order in a seat: who is in a turn, who has waited for one, who had one, who was just held."""
    in_turn: list[Stream] = []
    waited: list[Stream] = []
    had_one: list[Stream] = []
    just_held: list[Stream] = []
    streams.sort(key=_LAST_CHANGE)
    for stream in streams:
        if step < stream.fixed_until:
            (just_held if stream.held else in_turn).append(stream)
        else:
            (waited if stream.held else had_one).append(stream)
    return in_turn + waited + had_one[::-1] + just_held
