"""Months and times as billing counts and shows them."""

from __future__ import annotations

import datetime
from calendar import monthrange

import pytest
from hypothesis import given
from hypothesis import strategies as st

from control_plane.clock import add_months, iso, system_clock

UTC = datetime.UTC
moments = st.datetimes(datetime.datetime(2000, 1, 1), datetime.datetime(2199, 12, 31), timezones=st.just(UTC))


def test_months_from_the_31st_end_on_the_last_days_and_come_back() -> None:
    start = datetime.datetime(2026, 1, 31, 9, 30, tzinfo=UTC)
    days = [(add_months(start, months).month, add_months(start, months).day) for months in range(1, 13)]
    assert days[:4] == [(2, 28), (3, 31), (4, 30), (5, 31)]
    assert days[11] == (1, 31)


@pytest.mark.parametrize(("year", "day"), [(2027, 28), (2028, 29)])
def test_february_ends_when_it_ends(year: int, day: int) -> None:
    start = datetime.datetime(year - 1, 8, 30, tzinfo=UTC)
    assert add_months(start, 6) == datetime.datetime(year, 2, day, tzinfo=UTC)


@given(moments, st.integers(0, 120))
def test_months_keep_the_day_where_the_month_has_it_and_always_the_time(
    start: datetime.datetime, months: int
) -> None:
    end = add_months(start, months)
    assert (end.year * 12 + end.month) - (start.year * 12 + start.month) == months
    assert end.day == min(start.day, monthrange(end.year, end.month)[1])
    assert end.timetz() == start.timetz()


@given(moments, st.integers(0, 60))
def test_a_later_month_ends_later(start: datetime.datetime, months: int) -> None:
    assert add_months(start, months) < add_months(start, months + 1)


def test_times_are_shown_with_milliseconds_and_z() -> None:
    assert iso(datetime.datetime(2026, 5, 4, tzinfo=UTC)) == "2026-05-04T00:00:00.000Z"
    berlin = datetime.timezone(datetime.timedelta(hours=2))
    assert iso(datetime.datetime(2026, 5, 4, 1, 2, 3, 456_789, berlin)) == "2026-05-03T23:02:03.456Z"


def test_the_machines_clock_is_in_utc() -> None:
    assert system_clock().utcoffset() == datetime.timedelta()
