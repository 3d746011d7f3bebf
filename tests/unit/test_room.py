"""How many borrowed decodes steps have room for."""

from collections.abc import Callable, Iterator

import pytest

from contract.step_time import StepTime
from scheduler.prompts import Prompts
from scheduler.room import room_for_borrowed
from scheduler.step_rules import StepRules
from scheduler.streams import Decodes, StepSeat, Stream

RATE = 100.0


def decode(name: str, seat: StepSeat, *, kv_tokens: int = 0, joined: int | None = None) -> Stream:
    stream = Stream(name, seat, 0, 0.0)
    stream.known, stream.joined = kv_tokens, joined
    seat.decodes.begin(stream)
    return stream


def owed_seat(decodes: Decodes) -> StepSeat:
    seat = StepSeat(0.0, decodes)
    stream = decode("owed", seat)
    seat.streams["owed"] = stream
    seat.guarantee_tok_s = RATE
    seat.classify()
    return seat


def room(
    seat: StepSeat, model: StepTime, in_order: Callable[[], Iterator[Stream]]
) -> tuple[float, int, int | None]:
    """The third figure: of how many the order is told; None where all may."""
    decodes = seat.decodes
    prompts = Prompts(StepRules(), 2_048, decodes)
    allowed_s, count, fitting = room_for_borrowed({seat: RATE}, decodes, prompts, model, in_order)
    return allowed_s, count, None if fitting is None else len(fitting)


def test_no_more_are_looked_at_than_one_that_does_not_fit() -> None:
    seat = owed_seat(decodes := Decodes())
    crowd = StepSeat(0.0, decodes)
    streams = iter([decode(f"b{n}", crowd) for n in range(50)])
    # 2 ms, and 1 ms for each: 8 in 10 ms, one of them owed.
    assert room(seat, StepTime(2e-3, 0.0, 1e-3, 0.0), lambda: streams) == (0.01, 7, 7)
    assert len(list(streams)) == 50 - 8


def test_where_all_fit_none_is_looked_at_and_more_like_them_are_foreseen() -> None:
    seat = owed_seat(decodes := Decodes())
    crowd = StepSeat(0.0, decodes)
    for n in range(3):
        decode(f"b{n}", crowd)

    def nobody() -> Iterator[Stream]:
        raise AssertionError("asked for the order")

    assert room(seat, StepTime(2e-3, 0.0, 1.001e-3, 0.0), nobody) == (0.01, 6, None)


@pytest.mark.parametrize(("decode_s", "fits"), [(9e-3, 20), (12e-3, 0)])
def test_a_seats_own_further_decodes_make_room_for_themselves_if_they_bring_more_than_they_take(
    decode_s: float, fits: int
) -> None:
    seat = owed_seat(Decodes())
    own = [decode(f"own{n}", seat) for n in range(20)]
    allowed_s, count, fitting = room(seat, StepTime(0.5e-3, 0.0, decode_s, 0.0), lambda: iter(own))
    assert allowed_s == (1 + fits) / RATE
    assert fitting == fits
    assert count >= fits


def test_a_seats_own_further_decode_makes_room_for_others() -> None:
    seat = owed_seat(decodes := Decodes())
    crowd = StepSeat(0.0, decodes)
    streams = [decode("own", seat), *(decode(f"b{n}", crowd) for n in range(20))]
    # 1 ms, and 5 ms for each: the owed one alone would leave room for nobody else, both have it for a third.
    assert room(seat, StepTime(1e-3, 0.0, 5e-3, 0.0), lambda: iter(streams)) == (0.02, 2, 2)


def test_what_was_decoded_since_the_sequence_joined_the_batch_counts() -> None:
    seat = owed_seat(decodes := Decodes())
    crowd = StepSeat(0.0, decodes)
    # Each has 1,000 tokens in the KV cache by now.
    decodes.step = 900
    streams = [decode(f"b{n}", crowd, kv_tokens=100, joined=0) for n in range(20)]
    decodes.kv_tokens = 20 * 1_000
    assert room(seat, StepTime(0.0, 0.0, 0.0, 1.9e-6), lambda: iter(streams)) == (0.01, 5, 5)
