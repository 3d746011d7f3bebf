"""How the increase of a report is spread over the minutes it covers."""

from __future__ import annotations

import datetime
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from control_plane.throughput.service import MINUTE, Amounts, minute_of, span, spread
from tests.unit.control_plane.conftest import NOON

SECOND = datetime.timedelta(seconds=1)
HOUR = datetime.timedelta(hours=1)
DAY = datetime.timedelta(days=1)

counts = st.integers(0, 10**12)
seconds = st.integers(0, 100)
tokens = st.floats(0, 1e12)
amounts = st.builds(Amounts, *[counts] * 3, *[seconds] * 2, *[tokens] * 4).map(
    lambda drawn: replace(drawn, missed_seconds=min(drawn.missed_seconds, drawn.owed_seconds))
)
moments = st.datetimes(NOON.replace(tzinfo=None), (NOON + 2 * HOUR).replace(tzinfo=None)).map(
    lambda moment: moment.replace(tzinfo=datetime.UTC)
)
spans = st.tuples(moments, moments).map(sorted).filter(lambda pair: pair[0] < pair[1])


@given(amounts, spans)
def test_nothing_is_lost_or_gained(whole: Amounts, between: list[datetime.datetime]) -> None:
    parts = spread(whole, *between).values()
    total = sum(parts, Amounts())
    assert total.counts == whole.counts
    assert total.values == pytest.approx(whole.values)


@given(amounts, spans)
def test_only_minutes_that_are_touched_get_something_and_nobody_less_than_nothing(
    whole: Amounts, between: list[datetime.datetime]
) -> None:
    start, end = between
    for minute, part in spread(whole, start, end).items():
        assert minute == minute_of(minute)
        assert minute < end and start < minute + MINUTE
        assert part != Amounts() and not part.backwards


@given(amounts, spans)
def test_each_minutes_share_is_in_proportion_to_its_time(
    whole: Amounts, between: list[datetime.datetime]
) -> None:
    start, end = between
    for minute, part in spread(whole, start, end).items():
        share = (min(end, minute + MINUTE) - max(start, minute)) / (end - start)
        assert part.output_tokens == pytest.approx(whole.output_tokens * share, rel=1e-9, abs=1)
        assert part.owed_tokens == pytest.approx(whole.owed_tokens * share, rel=1e-6, abs=1e-3)


@given(amounts, spans)
def test_no_minute_misses_more_seconds_than_it_is_owed(
    whole: Amounts, between: list[datetime.datetime]
) -> None:
    for part in spread(whole, *between).values():
        assert 0 <= part.missed_seconds <= part.owed_seconds


def test_of_seconds_that_were_not_owed_none_is_missed() -> None:
    """Though a counter may go backwards, and the other not."""
    change = Amounts(owed_seconds=-5, missed_seconds=1)
    assert change.rises() == Amounts()
    assert Amounts(owed_seconds=2, missed_seconds=1).rises() == Amounts(owed_seconds=2, missed_seconds=1)


def test_a_report_across_a_border_is_split_there() -> None:
    found = spread(Amounts(10, 100, 1_000, 10, 1, 20.0, 2.0), NOON - 7.5 * SECOND, NOON + 2.5 * SECOND)
    assert found == {
        NOON - MINUTE: Amounts(8, 75, 750, 8, 1, 15.0, 1.5),
        NOON: Amounts(2, 25, 250, 2, 0, 5.0, 0.5),
    }


def test_a_report_at_the_very_border_is_of_the_minute_before() -> None:
    assert list(spread(Amounts(1), NOON - 10 * SECOND, NOON)) == [NOON - MINUTE]


def test_a_few_tokens_go_to_a_few_minutes() -> None:
    found = spread(Amounts(output_tokens=2), NOON, NOON + 10 * MINUTE)
    assert sum(part.output_tokens for part in found.values()) == 2
    assert len(found) == 2


# --- the time that a report covers ---------------------------------------------------------------


def test_a_report_covers_the_time_since_the_previous_one() -> None:
    assert span(NOON - 90 * SECOND, NOON, NOON) == (NOON - 90 * SECOND, NOON)
    assert span(NOON - DAY, NOON, NOON) == (NOON - DAY, NOON)


@pytest.mark.parametrize("previous", [None, NOON - DAY - SECOND, NOON, NOON + SECOND])
def test_without_a_sensible_previous_one_it_covers_its_last_10_s(previous: datetime.datetime | None) -> None:
    assert span(previous, NOON, NOON) == (NOON - 10 * SECOND, NOON)


def test_a_report_of_an_hour_ahead_is_taken_at_its_word_and_beyond_for_one_of_now() -> None:
    assert span(NOON, NOON + HOUR, NOON) == (NOON, NOON + HOUR)
    assert span(NOON - MINUTE, NOON + HOUR + SECOND, NOON) == (NOON - MINUTE, NOON)
    assert span(None, NOON + 1000 * DAY, NOON) == (NOON - 10 * SECOND, NOON)


def test_minutes_are_utcs_whatever_zone_a_report_names() -> None:
    odd = datetime.timezone(datetime.timedelta(hours=5, minutes=30, seconds=17))
    _, end = span(None, NOON.astimezone(odd), NOON)
    assert end == NOON and minute_of(end).tzinfo is datetime.UTC
