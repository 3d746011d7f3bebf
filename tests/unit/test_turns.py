from scheduler.streams import Decodes, StepSeat, Stream
from scheduler.turns import Order, in_order

TURN = 32


def seat_of(decodes: Decodes, *, tag: float = 0.0, weight: float = 1.0) -> StepSeat:
    seat = StepSeat(tag, decodes)
    seat.weight = weight
    return seat


def decode(name: str, seat: StepSeat, *, turn: int, fixed_until: int, held: bool = False) -> Stream:
    stream = Stream(name, seat, 0, 0.0)
    stream.turn, stream.fixed_until, stream.held = turn, fixed_until, held
    return stream


def of_every_kind(seat: StepSeat) -> list[Stream]:
    """At step 100, youngest last; `ran` took part for longer than `ran late`."""
    return [
        decode("just held", seat, turn=90, fixed_until=122, held=True),
        decode("ran", seat, turn=10, fixed_until=42),
        decode("waited", seat, turn=60, fixed_until=92, held=True),
        decode("in turn", seat, turn=80, fixed_until=112),
        decode("waited longest", seat, turn=30, fixed_until=62, held=True),
        decode("ran late", seat, turn=20, fixed_until=52),
    ]


def names(streams: list[Stream]) -> list[object]:
    return [stream.stream_id for stream in streams]


def test_in_a_seat_who_is_in_a_turn_comes_first_and_who_was_just_held_last() -> None:
    ordered = in_order(of_every_kind(seat_of(Decodes())), 0.0, 100, TURN)
    assert names(ordered) == ["in turn", "waited longest", "waited", "ran late", "ran", "just held"]


def test_a_seat_has_the_same_order_beside_others() -> None:
    decodes = Decodes()
    seat = seat_of(decodes)
    alone = names(in_order(of_every_kind(seat), 0.0, 100, TURN))
    other = decode("other", seat_of(decodes, tag=40.0), turn=0, fixed_until=0)
    beside = names(in_order([*of_every_kind(seat), other], 0.0, 100, TURN))
    assert beside == [*alone[:2], "other", *alone[2:]]


def test_a_seat_of_which_nothing_is_held_is_lifted_and_another_is_not() -> None:
    decodes = Decodes()
    idle, lacking = seat_of(decodes), seat_of(decodes)
    lacking.held = 1
    in_order([decode("a", idle, turn=0, fixed_until=0)], 70.0, 100, TURN)
    in_order([decode("b", lacking, turn=0, fixed_until=0)], 70.0, 100, TURN)
    assert (idle.tag, lacking.tag) == (70.0, 0.0)


def test_weight_brings_turns_sooner() -> None:
    decodes = Decodes()
    heavy, light = seat_of(decodes, weight=2.0), seat_of(decodes)
    streams = [decode(f"light{n}", light, turn=n, fixed_until=0) for n in range(2)]
    streams += [decode(f"heavy{n}", heavy, turn=n, fixed_until=0) for n in range(4)]
    ordered = [str(name)[:5] for name in names(in_order(streams, 0.0, 100, TURN))]
    assert ordered == ["light", "heavy", "heavy", "light", "heavy", "heavy"]


def release(order: Order, count: int) -> list[object]:
    released = order.longest_held(count)
    for stream in released:
        stream.held = False
    return names(released)


def hold(order: Order, stream: Stream, turn: int) -> None:
    stream.turn, stream.held = turn, True
    order.note_held(stream)


def test_who_has_been_held_longest_is_released_first_and_of_equals_the_first_in_the_order() -> None:
    seat = seat_of(Decodes())
    turns = {"a": 30, "b": 20, "c": 20, "runs": 10, "d": 40}
    order = Order([decode(n, seat, turn=t, fixed_until=0, held=n != "runs") for n, t in turns.items()])
    assert release(order, 3) == ["b", "c", "a"]
    assert release(order, 3) == ["d"]


def test_the_seat_that_is_furthest_behind_is_released_first() -> None:
    decodes = Decodes()
    ahead, behind = seat_of(decodes, tag=9.0), seat_of(decodes, tag=3.0)
    long, short = (
        decode("long", ahead, turn=1, fixed_until=0, held=True),
        decode("short", behind, turn=8, fixed_until=0, held=True),
    )
    assert release(Order([long, short]), 2) == ["short", "long"]


def test_who_is_held_or_leaves_between_reviews_is_counted_in() -> None:
    seat = seat_of(Decodes())
    streams = [decode(n, seat, turn=t, fixed_until=0, held=True) for t, n in enumerate("abcde")]
    order = Order(streams)
    assert release(order, 1) == ["a"]
    order.drop(streams[1])
    hold(order, streams[0], 50)
    late = decode("late", seat, turn=0, fixed_until=0)
    order.append(late)
    hold(order, late, 40)
    # It came back, but decodes anew, and is not held.
    order.drop(streams[2])
    streams[2].held = False
    order.append(streams[2])
    assert release(order, 9) == ["d", "e", "late", "a"]


def test_the_last_that_take_part_are_held_first() -> None:
    seat = seat_of(Decodes())
    streams = [decode(n, seat, turn=0, fixed_until=0, held=n == "c") for n in "abc"]
    order = Order(streams)
    assert names(order.last(1)) == ["b"]
    order.append(decode("d", seat, turn=0, fixed_until=0))
    assert names(order.last(2)) == ["d", "b"]
