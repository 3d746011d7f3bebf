"""The promises of the admission stage, held against random adversaries and long runs."""

import pytest

from benchmarks.simulator import Client, ClosedLoop, OpenLoop, Scenario, Shape, Simulation, trace
from benchmarks.simulator.adversaries import random_scenario
from benchmarks.simulator.soak import played
from scheduler import Capacity
from tests.simulation import evidence

CHUNK = 50


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 1_000, CHUNK))
def test_random_adversaries_break_no_promise(first: int) -> None:
    broken = [
        line for seed in range(first, first + CHUNK) for line in evidence.broken_by_random_adversary(seed)
    ]
    assert not broken


@pytest.mark.parametrize("seed", [13_869, 27_319, 33_998, 49_231, 51_829, 92_129])
def test_adversaries_that_broke_a_promise_once_break_none(seed: int) -> None:
    assert not evidence.broken_by_random_adversary(seed)


@pytest.mark.parametrize("family", [9, 19], ids=["readers", "sold nearly out"])
def test_every_second_node_that_can_just_keep_its_paces_slows_down(family: int) -> None:
    slowed = [seed for seed in range(family, 2_000, 20) if random_scenario(seed).changes]
    assert 35 <= len(slowed) <= 65
    for seed in slowed[:2]:
        judgement, events = played(seed)
        # And can keep them then, too: else nothing would be judged.
        assert judgement.pace_judged
        assert any(isinstance(event, trace.MachineChanged) and event.slowdown > 1.0 for event in events)


def test_now_and_then_answers_have_thousands_of_tokens() -> None:
    clients = [client for seed in range(500) for client in random_scenario(seed).clients]
    assert 3 <= sum(client.shape.max_tokens >= 3_000 for client in clients) <= 30


def test_same_seed_replays_the_same_trace() -> None:
    for seed in range(20):
        scenario = random_scenario(seed)
        assert Simulation(scenario, seed).run() == Simulation(random_scenario(seed), seed).run()
    assert Simulation(scenario, seed).run() != Simulation(scenario, seed + 1).run()


@pytest.mark.slow
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


@pytest.mark.parametrize("flood", [evidence.LONG_ANSWERS, evidence.LONG_PROMPTS], ids=["answers", "prompts"])
def test_owed_seats_keep_their_pace_beside_floods(flood: Shape) -> None:
    assert not evidence.broken_in(evidence.late_guests(flood), seed=1)


def test_late_guests_are_served_by_holding_borrowed_work() -> None:
    events = Simulation(evidence.late_guests(evidence.LONG_ANSWERS), seed=1).run()
    assert any(isinstance(event, trace.Composed) and event.held for event in events)


@pytest.mark.parametrize("others", [0, 3])
def test_lone_seat_keeps_every_slot_busy_however_many_seats_are_idle(others: int) -> None:
    seats = tuple(evidence.seat(name, guarantee=20.0) for name in "abcd"[: others + 1])
    alone = Scenario(seats, (Client("a", ClosedLoop(40), end_s=5.0),), Capacity(16, 1_000_000))
    steps = [e for e in Simulation(alone, seed=1).run() if isinstance(e, trace.Composed) and e.at < 5.0]
    busy = sum(len(step.parts) for step in steps) / len(steps)
    # A request that is let in while a step runs misses the one that is composed already.
    assert busy >= 0.9 * 16


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
