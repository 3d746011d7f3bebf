"""Money: what is shown, and how a block's price falls to its hours."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from control_plane.money import HOURS, show, slot_price


def hours_of(cents: int) -> list[int]:
    return [slot_price(cents, hour) for hour in range(HOURS)]


def test_27_dollars_are_shown_as_in_the_public_document() -> None:
    assert [show(cents) for cents in hours_of(2700)] == ["3.38", "3.37"] * 4


def test_hours_add_up_to_the_price_and_differ_by_a_cent_at_most() -> None:
    for cents in range(10_001):
        hours = hours_of(cents)
        assert sum(hours) == cents
        assert max(hours) - min(hours) <= 1


@given(st.integers(0, 10**12))
def test_hours_of_any_price_add_up(cents: int) -> None:
    hours = hours_of(cents)
    assert sum(hours) == cents
    assert min(hours) == cents // HOURS


@given(st.integers(0, 10**12))
def test_money_is_shown_with_two_decimals(cents: int) -> None:
    dollars, _, rest = show(cents).partition(".")
    assert len(rest) == 2
    assert int(dollars) * 100 + int(rest) == cents
