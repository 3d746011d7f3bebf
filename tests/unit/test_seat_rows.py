"""Which row of the step table is whose."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contract.step_time import StepTime
from scheduler import SeatTerms
from serving.seat_rows import SeatRows
from serving.step_table import NOBODY, ROWS, SeatRow, StepTable


def new_rows() -> SeatRows:
    table, path = StepTable.create(StepTime(1e-3, 1e-6, 1e-6, 1e-9), 1.0)
    path.unlink()
    return SeatRows(table)


@pytest.fixture
def rows() -> Iterator[SeatRows]:
    yield new_rows()


def terms(seat_id: str, *, g: float = 50.0, quantity: int = 1) -> SeatTerms:
    return SeatTerms(seat_id, quantity, g, 1_000.0, 60, 10_000)


def test_an_open_seat_has_its_terms_in_the_table(rows: SeatRows) -> None:
    rows.open(terms("a", quantity=3))
    assert rows.table.read_seat(rows.row("a")) == SeatRow(50.0, 1_000.0, 3.0, 3.0)


def test_new_terms_stay_in_the_same_row(rows: SeatRows) -> None:
    rows.open(terms("a"))
    row = rows.row("a")
    rows.open(terms("a", g=80.0))
    assert rows.row("a") == row
    assert rows.table.read_seat(row).guarantee_tok_s == 80.0


def test_a_closed_seat_is_guaranteed_nothing_and_keeps_its_weight(rows: SeatRows) -> None:
    rows.open(terms("a", quantity=2))
    rows.close("a")
    assert rows.table.read_seat(rows.row("a")) == SeatRow(0.0, 1_000.0, 2.0, 2.0)
    rows.open(terms("a", quantity=2))
    assert rows.table.read_seat(rows.row("a")).guarantee_tok_s == 50.0


def test_an_unknown_seat_is_nobody(rows: SeatRows) -> None:
    assert rows.row("a") == NOBODY
    assert rows.held_s("a") == 0.0
    rows.close("a")
    rows.forget("a")


def test_nobodys_row_is_never_given_away(rows: SeatRows) -> None:
    nobody = rows.table.read_seat(NOBODY)
    for number in range(100):
        rows.open(terms(f"s{number}"))
    assert all(rows.row(f"s{number}") != NOBODY for number in range(100))
    assert rows.table.read_seat(NOBODY) == nobody


@settings(max_examples=100)
@given(
    st.lists(
        st.tuples(st.sampled_from("abcdefgh"), st.sampled_from(("open", "close", "forget"))), max_size=60
    )
)
def test_no_two_seats_share_a_row(moves: list[tuple[str, str]]) -> None:
    rows, known = new_rows(), set()
    for seat_id, move in moves:
        if move == "open":
            rows.open(terms(seat_id))
            known.add(seat_id)
        elif move == "close":
            rows.close(seat_id)
        else:
            rows.forget(seat_id)
            known.discard(seat_id)
        taken = [rows.row(each) for each in known]
        assert len(set(taken)) == len(taken)
        assert NOBODY not in taken


def test_a_row_that_was_given_back_is_used_again_last(rows: SeatRows) -> None:
    rows.open(terms("a"))
    given_back = rows.row("a")
    rows.forget("a")
    for number in range(ROWS - 2):
        rows.open(terms(f"s{number}"))
        assert rows.row(f"s{number}") != given_back
    rows.open(terms("last"))
    assert rows.row("last") == given_back


def test_more_seats_than_rows_are_told(rows: SeatRows) -> None:
    for number in range(ROWS - 1):
        rows.open(terms(f"s{number}"))
    with pytest.raises(RuntimeError, match="more than 16383 seats"):
        rows.open(terms("one more"))
    # Those that are there can still change.
    rows.open(terms("s0", g=70.0))


def test_held_time_is_its_own_and_not_its_predecessors(rows: SeatRows) -> None:
    rows.open(terms("a"))
    rows.table.add_held(rows.row("a"), 5.0)
    assert rows.held_s("a") == 5.0
    rows.forget("a")
    for number in range(ROWS - 2):
        rows.open(terms(f"s{number}"))
    rows.open(terms("heir"))
    assert rows.held_s("heir") == 0.0
    rows.table.add_held(rows.row("heir"), 2.0)
    assert rows.held_s("heir") == 2.0


def test_held_time_outlives_the_block(rows: SeatRows) -> None:
    rows.open(terms("a"))
    rows.table.add_held(rows.row("a"), 5.0)
    rows.close("a")
    rows.open(terms("a"))
    assert rows.held_s("a") == 5.0
