"""The order in which borrowed decodes take part: seats by virtual time, the sequences of a seat by turns.

Of many that are held a step has room for few, so nothing here looks at more of them than it is asked for,
but for the first of each seat.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from heapq import heapify, heappop, heapreplace

from scheduler.streams import StepSeat, Stream


def in_order(seats: Iterable[StepSeat], virtual: float, step: int, turn_steps: int) -> Iterator[Stream]:
    """The borrowed decodes, lowest virtual time first, as it will be when all before them have had a turn.

    `virtual`: of the seats that lack something; the others are lifted to it. Until the caller has what it
    asked for, nothing may be held, released or over.
    """
    heads: list[tuple[float, int, int, StepSeat]] = []
    """Where a seat's next sequence comes, the seat's number, and how many of it came before."""
    for number, seat in enumerate(seats):
        if seat.borrowed_running or seat.borrowed_held:
            if not seat.held:
                seat.tag = max(seat.tag, virtual)
            heads.append((seat.tag, number, 0, seat))
    if len(heads) == 1:
        yield from _by_turn(heads[0][3], step)
        return
    heapify(heads)
    turns: dict[int, Iterator[Stream]] = {}
    while heads:
        _, number, before, seat = heads[0]
        if before == 0:
            turns[number] = _by_turn(seat, step)
        stream = next(turns[number], None)
        if stream is None:
            heappop(heads)
        else:
            yield stream
            place = seat.tag + (before + 1) * turn_steps / seat.weight
            heapreplace(heads, (place, number, before + 1, seat))


def _by_turn(seat: StepSeat, step: int) -> Iterator[Stream]:
    """The order in a seat: who is in a turn, who has waited for one, who had one, who was just held."""
    had_one: list[Stream] = []
    for stream in seat.borrowed_running:
        if step < stream.fixed_until:
            yield stream
        else:
            had_one.append(stream)
    held = iter(seat.borrowed_held)
    waits = next(held, None)
    while waits is not None and step >= waits.fixed_until:
        yield waits
        waits = next(held, None)
    yield from reversed(had_one)
    while waits is not None:
        yield waits
        waits = next(held, None)


def longest_held(seats: Iterable[StepSeat], count: int) -> list[Stream]:
    """Up to `count` borrowed decodes of the seats that are furthest behind, each seat's longest held first;
    seats that are equally far behind take turns.

    Not the first `in_order`, by which a review may have held them after their turn. Between reviews the tag
    of a seat with held decodes does not change.
    """
    heads: list[tuple[float, int, int, int, Stream, Iterator[Stream]]] = []
    for number, seat in enumerate(seats):
        if seat.borrowed_held:
            held = iter(seat.borrowed_held)
            first = next(held)
            heads.append((seat.tag, 0, first.turn, number, first, held))
    heapify(heads)
    found: list[Stream] = []
    while heads and len(found) < count:
        tag, before, _, number, stream, held = heads[0]
        found.append(stream)
        following = next(held, None)
        if following is None:
            heappop(heads)
        else:
            heapreplace(heads, (tag, before + 1, following.turn, number, following, held))
    return found
