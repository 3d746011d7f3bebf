"""When a set of blocks is open: borders, grace, midnight, and the way to the next start."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contract.blocks import (
    BORDER_GRACE_S,
    DAY_S,
    Block,
    DaySpan,
    format_clock,
    is_open,
    next_border,
    next_opening,
    parse_clock,
)

MIDNIGHT = 1_800_000_000 - 1_800_000_000 % DAY_S
NIGHT, EUROPE, AMERICAS = (block.span for block in Block)

spans = st.lists(st.sampled_from([NIGHT, EUROPE, AMERICAS]), min_size=1, max_size=3, unique=True)
moments = st.floats(MIDNIGHT, MIDNIGHT + 3 * DAY_S, allow_nan=False)


def test_blocks_are_the_three_thirds_of_a_day() -> None:
    assert [(span.start_s // 3600, span.end_s // 3600) for span in (NIGHT, EUROPE, AMERICAS)] == [
        (0, 8),
        (8, 16),
        (16, 24),
    ]


@pytest.mark.parametrize(
    ("second", "open_"),
    [(0, True), (8 * 3600 - 1, True), (8 * 3600 + 1.9, True), (8 * 3600 + 2, False), (DAY_S - 0.1, False)],
)
def test_night_is_open_from_midnight_to_eight_and_a_grace(second: float, open_: bool) -> None:
    assert is_open([NIGHT], MIDNIGHT + second) is open_


def test_grace_of_a_block_that_ends_at_midnight_reaches_into_the_next_day() -> None:
    assert is_open([AMERICAS], MIDNIGHT + 1.9)
    assert not is_open([AMERICAS], MIDNIGHT + BORDER_GRACE_S)


@given(moments)
def test_somebody_is_honoured_at_every_moment(now: float) -> None:
    assert any(is_open([span], now) for span in (NIGHT, EUROPE, AMERICAS))


@given(spans, moments)
def test_next_opening_is_the_first_start_to_come(chosen: list[DaySpan], now: float) -> None:
    start = next_opening(chosen, now)
    assert now < start <= now + DAY_S
    assert is_open(chosen, start)
    assert start % DAY_S in {span.start_s for span in chosen}


@given(spans, moments, st.floats(0, 1, exclude_max=True))
def test_nothing_changes_before_the_next_border(chosen: list[DaySpan], now: float, part: float) -> None:
    border = next_border(chosen, now)
    # Rounding must not take a moment close to the border onto it.
    before = min(now + (border - now) * part, math.nextafter(border, -math.inf))
    assert is_open(chosen, before) == is_open(chosen, now)


@pytest.mark.parametrize("second", [0, 1, 3599, 3600, 86_399, 86_400])
def test_clock_times_survive_a_round_trip(second: int) -> None:
    assert parse_clock(format_clock(second)) == second


@pytest.mark.parametrize("text", ["", "8:00", "24:01", "08:60", "08:00:60", "0800", "-1:00", "08:00 "])
def test_malformed_clock_times_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="time of day"):
        parse_clock(text)


@pytest.mark.parametrize(("start", "end"), [(0, 0), (5, 4), (-1, 5), (0, DAY_S + 1)])
def test_impossible_spans_are_refused(start: int, end: int) -> None:
    with pytest.raises(ValueError, match="start before it ends"):
        DaySpan(start, end)
