"""One conformance suite for every policy on every engine, and what each policy does for itself."""

import random
from collections.abc import Callable

import pytest

from benchmarks.simulator.continuous import ContinuousEngine
from benchmarks.simulator.engine import Rules
from benchmarks.simulator.entry import (
    EntryPolicy,
    Fcfs,
    Fits,
    Lcf,
    Ours,
    Rpm,
    Vtc,
    VtcPredicted,
    published,
)
from benchmarks.simulator.experiment import Played, play
from benchmarks.simulator.machines import CROWDED, LLAMA2_7B_A10G
from benchmarks.simulator.reservation import ReservationEngine
from benchmarks.simulator.workloads import Request, Workload
from scheduler import Capacity

SLOTS, KV = 16, 4_000


def ours() -> EntryPolicy:
    return Ours({}, Capacity(SLOTS, KV))


POLICIES: dict[str, Callable[[], EntryPolicy]] = {**published({}), "ours": ours}


def workload(seed: int) -> Workload:
    rng = random.Random(seed)
    arrivals = sorted(rng.uniform(0, 30) for _ in range(150))
    return Workload(
        "random",
        tuple(
            Request(i, rng.choice("abc"), at, rng.randint(1, 600), rng.randint(1, 200))
            for i, at in enumerate(arrivals)
        ),
    )


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", ["vllm", "artifact"])
@pytest.mark.parametrize("name", POLICIES)
def test_every_request_ends_once_within_slots_and_kv_cache(name: str, kind: str, seed: int) -> None:
    load, policy = workload(seed), POLICIES[name]()
    if kind == "vllm":
        vllm = ContinuousEngine(CROWDED, Rules(SLOTS, KV))
        played = play(load, policy, vllm)
        assert vllm.most_running <= SLOTS
        assert vllm.most_blocks <= KV // 16
    else:  # which asserts its pool after every step
        played = play(load, policy, ReservationEngine(CROWDED, KV))
    for served in played.served:
        assert served.refused == (served.finished_at is None)
        if served.first_token_at is not None and served.finished_at is not None:
            assert served.request.arrival_s < served.first_token_at <= served.finished_at
    if not isinstance(policy, Rpm):
        assert not any(served.refused for served in played.served)


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_hands_out_what_it_accepted_exactly_once(name: str) -> None:
    policy, load = POLICIES[name](), workload(3)
    accepted = [request for request in load.requests if policy.submit(request, request.arrival_s)]
    entered: list[Request] = []
    now = 31.0
    while True:
        entering = policy.enter(lambda request: True, now)
        if not entering:
            break
        entered += entering
        for request in entering:
            now += 0.01
            policy.produced([(request, request.output_tokens)], now)
            policy.finished(request, now)
    assert sorted(request.number for request in entered) == [request.number for request in accepted]


@pytest.mark.parametrize("name", POLICIES)
def test_no_policy_leaves_a_lone_request_waiting(name: str) -> None:
    policy = POLICIES[name]()
    [request, *_] = workload(4).requests
    assert policy.submit(request, 0.0)
    assert policy.enter(lambda request: True, 0.0) == [request]


class Watched:
    """A policy, and how often the engine would have taken one more when it had named all who enter."""

    def __init__(self, policy: EntryPolicy) -> None:
        self._policy = policy
        self.name, self.conserves_work = policy.name, policy.conserves_work
        self.produced, self.finished = policy.produced, policy.finished
        self._queued: dict[int, Request] = {}
        self.idle = 0

    def submit(self, request: Request, now: float) -> bool:
        accepted = self._policy.submit(request, now)
        if accepted:
            self._queued[request.number] = request
        return accepted

    def enter(self, fits: Fits, now: float) -> list[Request]:
        took_room: set[int] = set()

        def watched_fits(request: Request) -> bool:
            if taken := fits(request):
                took_room.add(request.number)
            return taken

        entering = self._policy.enter(watched_fits, now)
        for request in entering:
            del self._queued[request.number]
            if request.number not in took_room:
                fits(request)
        self.idle += bool(self._queued) and fits(next(iter(self._queued.values())))
        return entering


def idle_in_a_rush(policy: EntryPolicy, kind: str, kv_tokens: int) -> int:
    """How often the policy left room while more requests than fit waited. All are of one size, so that no
    turn excuses it."""
    requests = (Request(i, "abc"[i % 3], 0.001 * i, 100, 100) for i in range(150))
    watched, rush = Watched(policy), Workload("rush", tuple(requests))
    if kind == "vllm":
        vllm = ContinuousEngine(CROWDED, Rules(SLOTS, kv_tokens))
        play(rush, watched, vllm)
        assert vllm.most_running == SLOTS
    else:
        play(rush, watched, ReservationEngine(CROWDED, kv_tokens))
    return watched.idle


@pytest.mark.parametrize("kind", ["vllm", "artifact"])
@pytest.mark.parametrize("name", [name for name, make in POLICIES.items() if make().conserves_work])
def test_who_conserves_work_leaves_no_room_while_somebody_waits(name: str, kind: str) -> None:
    assert idle_in_a_rush(POLICIES[name](), kind, KV) == 0


def test_ours_leaves_free_what_it_expects_to_need_and_nothing_else() -> None:
    assert idle_in_a_rush(ours(), "vllm", KV) > 0
    assert idle_in_a_rush(Ours({}, Capacity(SLOTS, 100_000)), "vllm", 100_000) == 0


def order(policy: EntryPolicy, *sizes: tuple[str, int, int]) -> list[str]:
    """Clients in the order in which they enter one by one, each served before the next."""
    for number, (client, input_tokens, output_tokens) in enumerate(sizes):
        policy.submit(Request(number, client, 0.0, input_tokens, output_tokens), 0.0)
    entered = []
    for _ in sizes:
        [request] = policy.enter(_one(), 0.0)
        entered.append(request.client)
        policy.produced([(request, request.output_tokens)], 0.0)
        policy.finished(request, 0.0)
    return entered


def test_fcfs_serves_in_order_of_arrival() -> None:
    assert order(Fcfs(), ("a", 9, 9), ("a", 9, 9), ("b", 1, 1)) == ["a", "a", "b"]


def test_vtc_serves_the_smallest_counter_by_weight() -> None:
    sizes = [("a", 10, 10)] * 3 + [("b", 10, 10)] * 3
    assert order(Vtc({}), *sizes) == ["a", "b", "a", "b", "a", "b"]
    assert order(Vtc({"b": 2.0}), *sizes) == ["a", "b", "b", "a", "b", "a"]


def test_vtc_lifts_a_returning_client_and_lcf_does_not() -> None:
    for policy, expected in ((Vtc({}), "a"), (Lcf({}), "b")):
        assert order(policy, *[("a", 100, 100)] * 3) == ["a"] * 3
        policy.submit(Request(10, "a", 1.0, 1, 1), 1.0)
        policy.submit(Request(11, "b", 1.0, 1, 1), 1.0)
        [entering] = policy.enter(_one(), 1.0)
        assert entering.client == expected


def test_a_wrong_prediction_is_made_good_by_the_end() -> None:
    predicted, counted = VtcPredicted({}), Vtc({})
    sizes = [("a", 10, 100)] * 3 + [("b", 10, 100)] * 3
    for policy in (predicted, counted):
        order(policy, *sizes)
    assert predicted._counters == pytest.approx(counted._counters)
    assert not predicted._foreseen


def test_a_prediction_is_charged_at_entry() -> None:
    policy = VtcPredicted({})
    policy.submit(Request(0, "a", 0.0, 10, 100), 0.0)
    policy.enter(_one(), 0.0)
    assert 110 <= policy._counters["a"] <= 310
    assert policy._counters["a"] != 210


def test_rpm_refuses_from_the_limit_on_until_a_minute_has_passed() -> None:
    policy = Rpm(2)
    at = [0.0, 1.0, 2.0, 60.5, 60.6]
    answers = [policy.submit(Request(i, "a", t, 1, 1), t) for i, t in enumerate(at)]
    assert answers == [True, True, False, True, False]
    assert policy.submit(Request(9, "b", 60.6, 1, 1), 60.6)


def test_ours_runs_the_production_admission() -> None:
    two = Ours({"b": 2.0}, Capacity(1, 10_000))
    entered = []
    for number in range(12):
        two.submit(Request(number, "ab"[number % 2], 0.0, 100, 100), 0.0)
    for _ in range(9):
        [request] = two.enter(_one(), 0.0)
        entered.append(request.client)
        two.produced([(request, 100)], 0.0)
        two.finished(request, 0.0)
    assert entered.count("b") == 6


def test_same_workload_and_policy_replay_the_same_run() -> None:
    def run() -> Played:
        load = workload(5)
        return play(load, ours(), ContinuousEngine(LLAMA2_7B_A10G, Rules(SLOTS, KV)))

    assert run() == run()


def _one() -> Callable[[Request], bool]:
    """Room for one."""
    room = [True]
    return lambda request: bool(room) and room.pop()
