"""When serving is restarted, and how soon."""

from __future__ import annotations

import json
from typing import Any

import pytest

from agent.clock import ClockOffset
from agent.watchdog import LONGEST_LOOK_S, Backoff, Silence, Stall
from contract.reports import ThroughputReport, parse_report
from tests.contract import documents


def report(**seat: Any) -> ThroughputReport:
    document = documents.report()
    document["seats"][0] |= seat
    return parse_report(json.dumps(document))


def silent_for(
    silence: Silence, seconds: range, *, answered: bool = False, ready: bool = False
) -> list[bool]:
    return [silence.observe(answered=answered, ready=ready, now=float(now)) for now in seconds]


def test_delays_double_up_to_the_most_and_begin_anew_after_a_reset() -> None:
    backoff = Backoff(1.0, 60.0)
    assert [backoff.next_s() for _ in range(8)] == [1, 2, 4, 8, 16, 32, 60, 60]
    backoff.reset()
    assert backoff.next_s() == 1


def test_serving_that_loads_its_model_may_be_silent() -> None:
    assert not any(silent_for(Silence(120, was_ready=False), range(3600)))


def test_silence_after_readiness_is_noticed_at_its_limit() -> None:
    silence = Silence(120, was_ready=False)
    assert not silence.observe(answered=True, ready=True, now=0.0)
    seen = silent_for(silence, range(1, 200))
    assert seen.index(True) + 1 == 120


def test_adopted_serving_that_was_ready_once_may_not_be_silent() -> None:
    assert any(silent_for(Silence(120, was_ready=True), range(130)))


def test_one_answer_ends_the_silence() -> None:
    silence = Silence(120, was_ready=True)
    assert not any(silent_for(silence, range(119)))
    assert not silence.observe(answered=True, ready=False, now=119.0)
    assert not any(silent_for(silence, range(120, 239)))


def test_time_during_which_nobody_looked_proves_nothing() -> None:
    silence = Silence(120, was_ready=True)
    stall = Stall(300)
    busy = report(in_flight=1)
    for now in (0.0, 10_000.0, 20_000.0):
        assert not silence.observe(answered=False, ready=False, now=now)
        assert not stall.observe(busy, now)
    assert LONGEST_LOOK_S < 120


def test_work_in_flight_without_a_token_is_a_stall_at_its_limit() -> None:
    stall = Stall(300)
    seen = [stall.observe(report(in_flight=1), float(now)) for now in range(400)]
    assert seen.index(True) == 300


def test_idle_node_does_not_stall() -> None:
    stall = Stall(300)
    assert not any(stall.observe(report(in_flight=0), float(now)) for now in range(3600))


def test_one_token_ends_the_stall() -> None:
    stall = Stall(300)
    seen = [stall.observe(report(in_flight=1, output_tokens=now // 299), float(now)) for now in range(3000)]
    assert not any(seen)


def test_owed_tokens_and_clients_that_give_up_are_no_progress() -> None:
    stall = Stall(300)
    seen = [
        stall.observe(report(in_flight=1, owed_tokens=float(now), canceled=now, dispatched=now), float(now))
        for now in range(302)
    ]
    assert any(seen)


def test_quickest_call_tells_the_clock_offset() -> None:
    clock = ClockOffset()
    assert clock.seconds is None
    clock.measure(sent_at=100.0, received_at=102.0, server_at=90.0)
    assert clock.seconds == 11.0
    clock.measure(sent_at=200.0, received_at=200.1, server_at=190.05)
    clock.measure(sent_at=300.0, received_at=304.0, server_at=200.0)
    assert clock.seconds == pytest.approx(10.0)


def test_old_clock_measurements_fade() -> None:
    clock = ClockOffset()
    clock.measure(sent_at=0.0, received_at=0.0, server_at=-50.0)
    for second in range(1, 9):
        clock.measure(sent_at=float(second), received_at=second + 0.2, server_at=second + 0.1)
    assert clock.seconds is not None
    assert abs(clock.seconds) < 1e-6


def test_call_during_which_the_clock_was_set_back_measures_nothing() -> None:
    clock = ClockOffset()
    clock.measure(sent_at=100.0, received_at=50.0, server_at=75.0)
    assert clock.seconds is None
