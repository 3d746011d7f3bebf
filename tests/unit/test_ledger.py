"""Rules of what a seat was owed and what it got."""

import pytest

from scheduler.ledger import Ledger

G = 50.0


def ledger(quantity: int = 1) -> Ledger:
    return Ledger(G, quantity, now=0.0)


def test_nothing_is_owed_before_the_first_token_or_its_deadline() -> None:
    book = ledger()
    book.expect(1, 1, deadline=1.5)
    book.advance(1.5)
    assert book.owed == 0


def test_owed_starts_at_the_first_token() -> None:
    book = ledger()
    book.expect(1, 1, deadline=5.0)
    book.first_token(1, 0.5)
    book.advance(2.5)
    assert book.owed == pytest.approx(2.0 * G)


def test_owed_starts_at_the_deadline_if_the_first_token_is_late() -> None:
    book = ledger()
    book.expect(1, 1, deadline=1.0)
    book.first_token(1, 4.0)
    assert book.owed == pytest.approx(3.0 * G)
    book.advance(5.0)
    assert book.owed == pytest.approx(4.0 * G)


def test_requests_beyond_the_quantity_share_what_it_is_owed() -> None:
    book = ledger(quantity=2)
    for number in range(5):
        book.expect(number, 1, deadline=10.0)
        book.first_token(number, 0.0)
    book.advance(1.0)
    assert book.owed == pytest.approx(2 * G)


def test_no_request_is_owed_more_than_one_guarantee() -> None:
    book = ledger(quantity=20)
    book.expect(1, 1, deadline=1.0)
    book.first_token(1, 0.0)
    book.advance(1.0)
    assert book.owed == pytest.approx(G)


def test_sequences_of_one_request_count_one_by_one() -> None:
    book = ledger(quantity=4)
    book.expect(1, 3, deadline=1.0)
    book.first_token(1, 0.0)
    book.advance(1.0)
    assert book.owed == pytest.approx(3 * G)


def test_request_that_ends_is_owed_no_more() -> None:
    book = ledger()
    book.expect(1, 1, deadline=9.0)
    book.first_token(1, 0.0)
    book.end(1, 1, 2.0)
    book.advance(60.0)
    assert book.owed == pytest.approx(2.0 * G)
    assert book.rate == 0


def test_canceled_before_its_deadline_was_never_owed() -> None:
    book = ledger()
    book.expect(1, 1, deadline=1.0)
    book.end(1, 1, 0.5)
    book.advance(10.0)
    assert book.owed == 0


def test_canceled_after_its_deadline_is_owed_until_then() -> None:
    book = ledger()
    book.expect(1, 1, deadline=1.0)
    book.end(1, 1, 3.0)
    book.advance(10.0)
    assert book.owed == pytest.approx(2.0 * G)


def test_terms_change_what_is_owed_from_then_on() -> None:
    book = ledger()
    book.expect(1, 1, deadline=1.0)
    book.first_token(1, 0.0)
    book.set_terms(0.0, 1, 2.0)
    book.advance(10.0)
    assert book.owed == pytest.approx(2.0 * G)


def test_shortfall_is_what_a_busy_period_lacks_at_its_end() -> None:
    book = ledger()
    book.expect(1, 1, deadline=9.0)
    book.first_token(1, 0.0)
    book.deliver(30, 1.0)
    assert book.behind == pytest.approx(G - 30)
    book.end(1, 1, 1.0)
    assert book.shortfall == pytest.approx(G - 30)
    assert book.behind == 0


def test_surplus_of_one_busy_period_does_not_pay_for_the_next() -> None:
    book = ledger()
    for number, tokens in ((1, 1_000), (2, 0)):
        start = number * 10.0
        book.expect(number, 1, deadline=start + 5)
        book.first_token(number, start)
        book.deliver(tokens, start)
        book.end(number, 1, start + 1.0)
    assert book.shortfall == pytest.approx(G)


def test_attainment_is_delivered_over_owed_and_at_most_one() -> None:
    book = ledger()
    assert book.attainment(10, 0.0) is None
    book.expect(1, 1, deadline=90.0)
    book.first_token(1, 0.0)
    for second in range(10):
        book.deliver(40, second + 0.5)
    assert book.attainment(10, 10.5) == pytest.approx(0.8)
    book.deliver(1_000, 10.5)
    assert book.attainment(1, 11.5) == 1.0


def test_attainment_forgets_what_lies_before_its_window() -> None:
    book = ledger()
    book.expect(1, 1, deadline=0.5)
    for second in range(60, 70):
        book.deliver(50, second + 0.5)
    assert book.attainment(10, 70.5) == pytest.approx(1.0)
    assert book.attainment(60, 70.5) == pytest.approx(500 / (60 * G))


def test_a_second_counts_once_its_last_tokens_are_in() -> None:
    book = ledger()
    book.expect(1, 1, deadline=0.0)
    book.deliver(50, 0.5)
    book.deliver(10, 1.9)
    book.advance(2.3)
    assert book.attainment(1, 2.3) == pytest.approx(1.0), "the second before"
    book.deliver(40, 1.95)
    assert book.attainment(1, 2.6) == pytest.approx(1.0)


def test_the_worst_whole_second_is_told_for_as_long_as_looks_are_apart() -> None:
    book = ledger()
    book.expect(1, 1, deadline=90.0)
    book.first_token(1, 0.9)
    for second in range(1, 20):
        book.deliver(20 if second == 5 else 50, second + 0.5)
    book.end(1, 1, 20.1)
    seen = {now: book.lowest_second(now) for now in (21.6, 29.6)}
    # The seconds in which the busy period began and ended are cut, and have no token.
    assert seen == {21.6: 1.0, 29.6: 1.0}
    assert book.lowest_second(40.6) is None


@pytest.mark.parametrize(("now", "lowest"), [(6.9, 1.0), (7.1, 0.4), (18.9, 0.4), (19.1, 1.0)])
def test_a_bad_second_is_told_once_it_is_over_and_for_twelve_seconds(now: float, lowest: float) -> None:
    book = ledger()
    book.expect(1, 1, deadline=0.0)
    for second in range(int(now)):
        book.deliver(20 if second == 5 else 50, second + 0.5)
    assert book.lowest_second(now) == pytest.approx(lowest)


def test_every_whole_second_that_was_owed_is_counted_once_and_with_less_than_95_percent_as_missed() -> None:
    # Steps end at odd times: of what is owed there are only sums of fractions.
    for tokens, missed in ((47, 3), (48, 0)):
        book = ledger()
        book.expect(1, 1, deadline=90.0)
        book.first_token(1, 0.7)
        for second in range(1, 20):
            for step in range(10):
                made = tokens - 45 if step == 9 and second in (3, 4, 11) else 5
                book.deliver(made, second + 0.03 + 0.0937 * step)
        book.end(1, 1, 20.4)
        # Those in which the busy period began and ended are cut.
        assert [book.seconds(at) for at in (20.9, 21.1, 90.0)] == [(18, missed), (19, missed), (19, missed)]


def test_exactly_95_percent_is_enough() -> None:
    book = Ledger(40.0, 1, now=0.0)
    book.expect(1, 1, deadline=0.0)
    # The sum of what is owed from step to step is a hair above 40 in some seconds.
    for second in range(50):
        for step in range(38):
            book.deliver(1, second + step / 38)
    assert book.seconds(51.9) == (50, 0)


def test_seconds_are_counted_however_rarely_they_are_looked_at() -> None:
    book, watched = ledger(), ledger()
    looks = []
    for one in (book, watched):
        one.expect(1, 1, deadline=0.0)
        for second in range(1_000):
            one.deliver(20 if second % 10 == 7 else 50, second + 0.5)
            if one is watched:
                looks.append(one.seconds(second + 0.5))
        one.end(1, 1, 1_000.0)
    # An idle gap, in which the last seconds stay where they are until they are looked at.
    assert book.seconds(1e6) == watched.seconds(1e6) == (1_000, 100)
    assert looks == sorted(looks), "they only grow"


def test_seconds_of_a_long_silence_are_all_owed_and_all_missed() -> None:
    book = ledger()
    book.expect(1, 1, deadline=0.0)
    book.end(1, 1, 500.0)
    assert book.seconds(502.0) == (500, 500)


def test_tokens_that_come_late_count_in_the_second_in_which_they_were_made() -> None:
    book = ledger()
    book.expect(1, 1, deadline=0.0)
    book.deliver(40, 0.9)
    assert book.seconds(1.95) == (0, 0)
    book.deliver(10, 0.95)
    assert book.seconds(2.0) == (1, 0)


def test_tokens_that_nothing_was_owed_for_are_borrowed() -> None:
    book = ledger()
    book.expect(1, 1, deadline=9.0)
    book.first_token(1, 0.0)
    book.deliver(30, 1.0)
    assert book.borrowed == 0
    book.deliver(30, 1.0)
    assert book.borrowed == pytest.approx(10)
    book.deliver(50, 2.0)
    assert book.borrowed == pytest.approx(10)
    book.end(1, 1, 2.0)
    book.deliver(5, 3.0)
    assert book.borrowed == pytest.approx(15)


def test_deadlines_kept_are_bounded_by_unfinished_requests() -> None:
    book = ledger()
    book.expect(0, 1, deadline=0.1)  # the oldest never answers, so it cannot be dropped from the front
    for number in range(1, 10_000):
        book.expect(number, 1, deadline=1e6 + number)
        book.end(number, 1, 0.05)
    assert len(book._deadlines) < 50
