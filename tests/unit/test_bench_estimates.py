"""Percentiles, paired ratios and their intervals."""

from __future__ import annotations

import math

import pytest

from benchmarks.estimates import mean_estimate, median_estimate, percentile, percentile_ratio
from benchmarks.fairness import pair_ratios, weighted_ratio
from benchmarks.load import Phase, RequestRecord, Served


def test_percentile_interpolates_between_samples() -> None:
    assert percentile([1.0, 2.0, 3.0, 4.0, 5.0], 0.5) == 3.0
    assert percentile([0.0, 10.0], 0.95) == pytest.approx(9.5)


def test_percentile_of_nothing_is_not_a_number() -> None:
    assert math.isnan(percentile([], 0.99))


def test_interval_holds_the_median_and_narrows_with_samples() -> None:
    few = median_estimate([0.9, 1.0, 1.1, 0.95, 1.05], seed=1)
    many = median_estimate([0.9, 1.0, 1.1, 0.95, 1.05] * 20, seed=1)
    assert few.low <= few.value <= few.high
    assert few.value == many.value == 1.0
    assert many.high - many.low < few.high - few.low


def test_two_samples_give_no_interval_that_could_meet_a_target() -> None:
    estimate = median_estimate([1.0, 1.0], seed=1)
    assert estimate.value == 1.0
    assert not estimate.low >= 0.97
    assert "too few" in str(estimate)


def test_the_interval_of_a_mean_is_students() -> None:
    estimate = mean_estimate([1.0, 2.0, 3.0, 4.0, 5.0])
    # t of 4 degrees of freedom is 2.776, the standard error sqrt(2.5 / 5).
    assert (estimate.low, estimate.value, estimate.high) == pytest.approx((1.037, 3.0, 4.963), abs=1e-3)
    assert mean_estimate([1.0, 2.0, 3.0]).low == pytest.approx(2.0 - 4.303 / math.sqrt(3), abs=1e-3)
    # From 31 samples on that of 31.
    assert mean_estimate([0.0, 1.0] * 50).high == pytest.approx(0.5 + 2.042 * 0.050252, abs=1e-4)


def test_the_mean_of_two_samples_has_no_interval() -> None:
    assert mean_estimate([1.0, 1.0]).value == 1.0
    assert not mean_estimate([1.0, 1.0]).low >= 0.97
    assert math.isnan(mean_estimate([]).value)


def test_same_seed_gives_the_same_interval() -> None:
    samples = [0.97, 1.01, 0.99, 1.03, 0.95, 1.0]
    assert median_estimate(samples, seed=3) == median_estimate(samples, seed=3)


def test_ratio_of_identical_systems_holds_one() -> None:
    samples = [float(sample) for sample in range(1, 101)]
    ratio = percentile_ratio(samples, samples, 0.5, seed=1)
    assert ratio.value == 1.0
    assert ratio.low < 1.0 < ratio.high


def test_a_ratio_against_no_samples_is_not_a_number() -> None:
    assert math.isnan(percentile_ratio([1.0], [], 0.99, seed=1).value)


def test_a_pair_is_ours_over_the_mean_of_the_plain_runs_around_it() -> None:
    rows = [
        {"round": 1, "run": "before", "tok_s": 100.0},
        {"round": 1, "run": "ours", "tok_s": 99.0},
        {"round": 1, "run": "after", "tok_s": 120.0},
        {"round": 2, "run": "before", "tok_s": 100.0},
    ]
    ours, control = pair_ratios(rows)
    assert ours == pytest.approx([0.9])
    assert control == pytest.approx([1.2])


def test_a_drift_of_the_machine_cancels_in_a_pair() -> None:
    rows = [
        {"round": 1, "run": run, "tok_s": tok_s}
        for run, tok_s in (("before", 100.0), ("ours", 110.0), ("after", 120.0))
    ]
    assert pair_ratios(rows)[0] == pytest.approx([1.0])


def test_service_is_input_plus_twice_output() -> None:
    assert Served(input_tokens=100, output_tokens=30).cost() == 160.0


def test_service_of_a_window_is_what_came_between_its_ends() -> None:
    assert Served(150, 90) - Served(100, 30) == Served(50, 60)


def test_service_by_weight_is_one_when_fair() -> None:
    assert weighted_ratio(100.0, 1, 300.0, 3) == pytest.approx(1.0)
    assert weighted_ratio(160.0, 1, 40.0, 1) == pytest.approx(4.0)
    assert weighted_ratio(1.0, 1, 0.0, 1) == math.inf


def test_rates_and_requests_are_those_of_the_window() -> None:
    def record(due_s: float) -> RequestRecord:
        return RequestRecord("quiet", due_s=due_s, sent_s=due_s, input_tokens=1, max_tokens=1)

    phase = Phase(2.0, 6.0, {"quiet": Served(10, 40)}, [record(1.0), record(2.0), record(6.0)])
    assert phase.output_tok_s("quiet") == 10.0
    assert [each.due_s for each in phase.of("quiet")] == [2.0]


def test_decode_rate_leaves_out_the_first_token() -> None:
    record = RequestRecord("quiet", due_s=0.0, sent_s=0.5, input_tokens=1, max_tokens=11)
    record.first_token_s, record.last_token_s, record.output_tokens = 1.0, 2.0, 11
    assert record.ttft_s == 0.5
    assert record.decode_tok_s == pytest.approx(10.0)
