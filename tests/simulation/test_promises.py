"""The promises of the admission stage, held against random adversaries and long runs."""

import pytest

from benchmarks.simulator import Client, ClosedLoop, OpenLoop, Scenario, Simulation, trace
from benchmarks.simulator.adversaries import random_scenario
from benchmarks.simulator.engine import QWEN3_8B_H100, Engine, Run
from scheduler import Capacity
from tests.simulation import evidence

CHUNK = 50


@pytest.mark.parametrize("first", range(0, 1_000, CHUNK))
def test_random_adversaries_break_no_promise(first: int) -> None:
    broken = [
        line for seed in range(first, first + CHUNK) for line in evidence.broken_by_random_adversary(seed)
    ]
    assert not broken


def test_same_seed_replays_the_same_trace() -> None:
    for seed in range(20):
        scenario = random_scenario(seed)
        assert Simulation(scenario, seed).run() == Simulation(random_scenario(seed), seed).run()
    assert Simulation(scenario, seed).run() != Simulation(scenario, seed + 1).run()


def test_random_adversaries_reach_every_kind_of_end() -> None:
    reasons = set()
    canceled = 0
    for seed in range(200):
        for event in Simulation(random_scenario(seed), seed).run():
            if isinstance(event, trace.Refused | trace.Evicted):
                reasons.add(f"{type(event).__name__} {event.reason}")
            canceled += isinstance(event, trace.Canceled)
    expected = {"request_limit", "token_limit", "queue_full", "outside_block", "too_large"}
    assert {f"Refused {reason}" for reason in expected} <= reasons
    assert {"Evicted queue_timeout", "Evicted outside_block"} <= reasons
    assert canceled


@pytest.mark.parametrize("name", evidence.PAIRS)
def test_backlogged_seats_share_by_weight_within_5_percent(name: str) -> None:
    assert evidence.share_ratio(*evidence.PAIRS[name]) == pytest.approx(1.0, abs=0.05)


def test_returning_seat_brings_no_credit() -> None:
    assert not evidence.broken_in(evidence.returning_seat(), seed=1)


def test_refusals_are_honest_where_both_limits_are_tight() -> None:
    assert not evidence.broken_in(evidence.tight_limits(), seed=1)


def test_owed_seats_enter_a_node_full_of_borrowed_work_at_once() -> None:
    assert not evidence.broken_in(evidence.full_of_borrowed_work(), seed=1)


@pytest.mark.parametrize("others", [0, 3])
def test_lone_seat_keeps_every_slot_but_the_reserve_busy(others: int) -> None:
    seats = tuple(evidence.seat(name, guarantee=20.0) for name in "abcd"[: others + 1])
    alone = Scenario(seats, (Client("a", ClosedLoop(40), end_s=5.0),), Capacity(16, 1_000_000))
    steps = [e for e in Simulation(alone, seed=1).run() if isinstance(e, trace.Stepped) and e.at < 5.0]
    busy = sum(len(step.work) for step in steps) / len(steps)
    assert busy == pytest.approx(16 - others, rel=0.01)


def test_clients_do_not_disturb_each_others_draws() -> None:
    """So that two runs that differ in one client can be compared."""
    client = Client("a", OpenLoop(5.0), end_s=5.0)
    seats = (evidence.seat("a"), evidence.seat("b"))
    arrivals = []
    for more in ((), (Client("b", OpenLoop(9.0), end_s=5.0),)):
        events = Simulation(Scenario(seats, (client, *more), Capacity(64, 1_000_000)), seed=3).run()
        arrivals.append([e.at for e in events if isinstance(e, trace.Submitted) and e.seat_id == "a"])
    assert arrivals[0] == arrivals[1]
    assert arrivals[0]


def test_step_time_follows_the_model() -> None:
    assert QWEN3_8B_H100.seconds(100, 10, 1_000) == pytest.approx(7.2e-3 + 2.15e-3 + 0.12e-3 + 0.046e-3)


def test_prefill_is_chunked_by_the_budget_and_the_first_token_comes_with_its_last_chunk() -> None:
    engine = Engine(QWEN3_8B_H100)
    engine.add(Run(1, prefill_left=3_000, output_left=2, count=1, kv_tokens=0))
    engine.add(Run(2, prefill_left=10, output_left=1, count=2, kv_tokens=0))
    works = []
    while engine.busy:
        step = engine.plan()
        works.append(step.work)
        engine.apply(step)
    assert works == [((1, 2_048, 0),), ((1, 952, 1), (2, 10, 2)), ((1, 0, 1),)]
