"""The order in which borrowed decodes take part: seats by virtual time, the sequences of a seat by turns."""

from __future__ import annotations

from operator import attrgetter

from scheduler.streams import StepSeat, Stream

_LAST_CHANGE = attrgetter("turn")
_PLACE = attrgetter("place")


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
