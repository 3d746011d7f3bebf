"""Rules of the request and token limits."""

import math

from hypothesis import given
from hypothesis import strategies as st

from scheduler.buckets import TokenBucket


def test_full_bucket_gives_its_whole_limit_at_once() -> None:
    bucket = TokenBucket(60, now=0.0)
    assert bucket.wait_s(60, 0.0) == 0
    bucket.take(60, 0.0)
    assert bucket.wait_s(1, 0.0) > 0


def test_bucket_refills_at_its_limit_per_minute() -> None:
    bucket = TokenBucket(60, now=0.0)
    bucket.take(60, 0.0)
    assert bucket.level(10.0) == 10.0


def test_bucket_never_holds_more_than_its_limit() -> None:
    bucket = TokenBucket(60, now=0.0)
    assert bucket.level(3_600.0) == 60.0
    bucket.give_back(10, 3_600.0)
    assert bucket.level(3_600.0) == 60.0


def test_more_than_the_limit_can_never_be_taken() -> None:
    assert TokenBucket(60, now=0.0).wait_s(61, 0.0) == math.inf


@given(
    limit=st.integers(1, 100_000_000),
    taken=st.floats(0, 1),
    wanted=st.floats(0, 1),
    now=st.floats(0, 1e7),
)
def test_retry_after_the_wait_is_admitted(limit: int, taken: float, wanted: float, now: float) -> None:
    bucket = TokenBucket(limit, now)
    bucket.take(int(taken * limit), now)
    units = int(wanted * limit)
    assert bucket.wait_s(units, now + bucket.wait_s(units, now)) == 0


def test_wait_is_no_longer_than_needed() -> None:
    bucket = TokenBucket(60, now=0.0)
    bucket.take(60, 0.0)
    assert bucket.wait_s(3, 0.0) == 3.0
    assert bucket.wait_s(3, 2.9) > 0


def test_debt_of_an_underestimated_request_is_refilled_like_anything_else() -> None:
    bucket = TokenBucket(60, now=0.0)
    bucket.take(60, 0.0)
    bucket.give_back(-10, 0.0)
    assert bucket.level(0.0) == -10.0
    assert bucket.level(10.0) == 0.0


def test_new_limit_keeps_what_is_in_use_in_use() -> None:
    bucket = TokenBucket(60, now=0.0)
    bucket.take(40, 0.0)
    bucket.resize(100, 0.0)
    assert bucket.level(0.0) == 60.0
    bucket.resize(30, 0.0)
    assert bucket.level(0.0) == -10.0


def test_reset_is_when_nothing_is_in_use() -> None:
    bucket = TokenBucket(60, now=0.0)
    bucket.take(30, 0.0)
    assert bucket.seconds_to_full(0.0) == 30.0
    assert bucket.seconds_to_full(30.0) == 0.0
