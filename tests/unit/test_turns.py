from collections.abc import Callable

import pytest

from scheduler.streams import Decodes, StepSeat, Stream
from scheduler.turns import in_order, longest_held

TURN = 32


def seat_of(*, tag: float = 0.0, weight: float = 1.0) -> StepSeat:
    seat = StepSeat(tag, Decodes())
    seat.weight = weight
    return seat


def decode(name: str, seat: StepSeat, *, turn: int = 0, fixed_until: int = 0, held: bool = False) -> Stream:
    stream = Stream(name, seat, 0, 0.0)
    stream.turn, stream.fixed_until, stream.held = turn, fixed_until, held
    seat.decodes.begin(stream)
    return stream


def of_every_kind(seat: StepSeat) -> None:
    """At step 100; `ran` took part for longer than `ran late`."""
    decode("ran", seat, turn=10, fixed_until=42)
    decode("ran late", seat, turn=20, fixed_until=52)
    decode("waited longest", seat, turn=30, fixed_until=62, held=True)
    decode("waited", seat, turn=60, fixed_until=92, held=True)
    decode("turn over", seat, turn=68, fixed_until=100)
    decode("wait over", seat, turn=68, fixed_until=100, held=True)
    decode("in turn", seat, turn=80, fixed_until=112)
    decode("began", seat, turn=85, fixed_until=85)
    decode("just held", seat, turn=90, fixed_until=122, held=True)


def order(*seats: StepSeat, virtual: float = 0.0) -> list[object]:
    return [stream.stream_id for stream in in_order(seats, virtual, 100, TURN)]


def test_in_a_seat_who_is_in_a_turn_comes_first_and_who_was_just_held_last() -> None:
    of_every_kind(seat := seat_of())
    waited, had_one = ["waited longest", "waited", "wait over"], ["began", "turn over", "ran late", "ran"]
    assert order(seat) == ["in turn", *waited, *had_one, "just held"]


def test_a_seat_has_the_same_order_beside_others() -> None:
    of_every_kind(seat := seat_of())
    alone = order(seat)
    other = seat_of(tag=40.0)
    decode("other", other)
    assert order(seat, other, seat_of()) == [*alone[:2], "other", *alone[2:]]


def test_a_seat_of_which_nothing_is_held_is_lifted_and_another_is_not() -> None:
    idle, lacking = seat_of(), seat_of()
    lacking.held = 1
    decode("a", idle)
    decode("b", lacking)
    assert order(idle, lacking, virtual=70.0) == ["b", "a"]
    assert (idle.tag, lacking.tag) == (70.0, 0.0)


def test_weight_brings_turns_sooner() -> None:
    heavy, light = seat_of(weight=2.0), seat_of()
    for n in range(4):
        decode(f"heavy {n}", heavy, turn=n)
    for n in range(2):
        decode(f"light {n}", light, turn=n)
    assert order(light, heavy) == ["light 1", "heavy 3", "heavy 2", "light 0", "heavy 1", "heavy 0"]


def longest(*seats: StepSeat, count: int) -> list[object]:
    return [stream.stream_id for stream in longest_held(seats, count)]


def test_who_has_been_held_longest_is_released_first() -> None:
    seat = seat_of()
    streams = [decode(name, seat, held=name != "runs") for name in ("a", "b", "runs", "c")]
    # It was released and held again.
    for held in (False, True):
        streams[0].held = held
        seat.put_last(streams[0])
    assert longest(seat, count=2) == ["b", "c"]
    assert longest(seat, count=9) == ["b", "c", "a"]


def test_the_seat_that_is_furthest_behind_is_released_first_and_equals_take_turns() -> None:
    ahead, behind, equal = seat_of(tag=9.0), seat_of(tag=3.0), seat_of(tag=3.0)
    decode("ahead", ahead, turn=0, held=True)
    for turn in (5, 6):
        decode(f"behind since {turn}", behind, turn=turn, held=True)
    for turn in (1, 2, 9):
        decode(f"equal since {turn}", equal, turn=turn, held=True)
    assert longest(ahead, behind, equal, seat_of(), count=9) == [
        "equal since 1",
        "behind since 5",
        "equal since 2",
        "behind since 6",
        "equal since 9",
        "ahead",
    ]


def test_seats_that_are_equally_far_ahead_take_turns_in_the_order() -> None:
    seats = [seat_of(tag=5.0), seat_of(tag=5.0)]
    for number in range(2):
        for name, seat in zip("ab", seats, strict=True):
            decode(f"{name}{number}", seat, held=True)
    assert order(*seats) == ["a0", "b0", "a1", "b1"]


def become_owed(seat: StepSeat, stream: Stream) -> None:
    seat.streams[stream.stream_id] = stream
    seat.guarantee_tok_s = 1.0
    seat.classify()


def end(seat: StepSeat, stream: Stream) -> None:
    seat.decodes.end(stream)


@pytest.mark.parametrize("ceases", [become_owed, end])
@pytest.mark.parametrize("held", [True, False])
def test_who_is_owed_or_over_is_in_no_order(ceases: Callable[[StepSeat, Stream], None], held: bool) -> None:
    seat = seat_of()
    ceases(seat, decode("a", seat, held=held))
    assert order(seat) == longest(seat, count=1) == []


def test_a_decode_that_is_owed_no_more_counts_as_one_that_begins() -> None:
    seat = seat_of()
    owed = decode("owed", seat, turn=10, fixed_until=42)
    become_owed(seat, owed)
    decode("other", seat, turn=90, fixed_until=90)
    seat.guarantee_tok_s = 0.0
    seat.decodes.step = 100
    seat.classify()
    assert order(seat) == ["owed", "other"]
    assert owed.turn == owed.fixed_until == 100
