"""Who gives way to owed requests that wait, and in which order the engine serves."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from typing import Any

import pytest

from contract.step_time import StepTime
from scheduler.arrange import arrange
from scheduler.step_time import StepTimeFit
from scheduler.steps import StepPolicy

MACHINE = StepTime(1e-3, 1e-5, 1e-4, 0.0)


class FakeEngine:
    """A block is one token; whoever is not in `running` waits."""

    step_tokens = 1_000
    decode_tokens = 1

    def __init__(self, slots: int, kv_blocks: int) -> None:
        self.policy = StepPolicy(StepTimeFit(MACHINE, seed_samples=1e6))
        for seat, guarantee in (("sold", 10.0), ("free", 0.0)):
            self.policy.set_seat(seat, guarantee, 1_000.0, 100, 1.0)
        self.slots, self.kv_blocks = slots, kv_blocks
        self.tokens: dict[Hashable, int] = {}
        self.running: list[Hashable] = []
        self.waiting: list[Hashable] = []
        self.unready: set[Hashable] = set()
        self.fixed: set[Hashable] = set()
        """Whose KV cache cannot be taken at present."""

    def wait(self, *names: str, seat: str = "sold", tokens: int = 10, due: float = math.inf) -> None:
        for name in names:
            self.policy.enter(name, seat, tokens, due, 0.0)
            self.tokens[name] = tokens
            self.waiting.append(name)

    def run(self, *names: str, seat: str = "free", tokens: int = 10) -> None:
        self.wait(*names, seat=seat, tokens=tokens)
        for name in names:
            self.waiting.remove(name)
            self.running.append(name)
        self.policy.composed(dict.fromkeys(names, tokens), 0.0)
        self.policy.completed(0.1)

    def arrange(self, now: float = 1.0) -> int:
        return arrange(self.policy, self, now)

    def ready(self, stream_id: Hashable) -> bool:
        return stream_id not in self.unready

    def hold(self, stream_id: Hashable, held: bool) -> None:
        pass

    def running_count(self) -> int:
        return len(self.running)

    def running_ids(self) -> list[Hashable]:
        return list(self.running)

    def free_slots(self) -> int:
        return self.slots - len(self.running)

    def free_blocks(self) -> int:
        return self.kv_blocks - sum(self.tokens[each] for each in self.running)

    def blocks(self, tokens: int) -> int:
        return 0

    def blocks_for(self, stream_id: Hashable, enough: int) -> int:
        return self.tokens[stream_id]

    def fits_beside(self, stream_id: Hashable, more: int, running_ids: list[Hashable]) -> bool:
        held = sum(self.tokens[each] for each in running_ids)
        return self.tokens[stream_id] + more + held <= self.kv_blocks

    def preempt(self, stream_id: Hashable, now: float) -> bool:
        if stream_id in self.fixed:
            return False
        self.running.remove(stream_id)
        self.waiting.insert(0, stream_id)
        self.policy.preempted(stream_id, self.tokens[stream_id], now)
        return True

    def put_first(self, stream_ids: list[Hashable]) -> None:
        self.waiting = stream_ids + [each for each in self.waiting if each not in stream_ids]

    def put_last(self, stream_ids: list[Hashable]) -> None:
        self.waiting = [each for each in self.waiting if each not in stream_ids] + stream_ids

    def serve_by(self, rank: Callable[[Hashable], Any]) -> None:
        self.running.sort(key=rank)

    def serve_last(self, stream_ids: list[Hashable]) -> None:
        self.running = [each for each in self.running if each not in stream_ids] + stream_ids


def test_owed_ones_come_first_by_deadline_and_equals_as_they_came() -> None:
    engine = FakeEngine(slots=9, kv_blocks=1_000)
    engine.wait("borrowed", seat="free")
    engine.wait("late", due=9.0)
    engine.wait("a", "b", due=5.0)
    engine.wait("early", due=2.0)
    engine.arrange()
    assert engine.waiting == ["early", "a", "b", "late", "borrowed"]


def test_as_many_give_way_as_owed_ones_need_slots() -> None:
    engine = FakeEngine(slots=4, kv_blocks=1_000)
    engine.run("a", "b", "c", "d")
    engine.wait("x", "y")
    engine.arrange()
    assert engine.running == ["c", "d"]
    assert engine.waiting == ["x", "y", "b", "a"]


def test_only_as_many_give_way_as_kv_cache_is_needed() -> None:
    engine = FakeEngine(slots=9, kv_blocks=100)
    engine.run("a", "b", "c", tokens=30)
    engine.wait("x", tokens=35)
    engine.arrange()
    assert engine.running == ["b", "c"]


@pytest.fixture
def short_of_kv() -> FakeEngine:
    """The large one would not fit even without the borrowed one; the medium one would."""
    engine = FakeEngine(slots=9, kv_blocks=100)
    engine.run("owed", seat="sold", tokens=50)
    engine.run("borrowed", tokens=30)
    engine.wait("large", tokens=60, due=3.0)
    engine.wait("medium", tokens=30, due=4.0)
    engine.wait("free", seat="free")
    return engine


def test_who_would_not_fit_even_so_takes_nothing_and_lets_the_others_pass(short_of_kv: FakeEngine) -> None:
    short_of_kv.wait("small", tokens=10, due=2.0)
    short_of_kv.arrange(now=1.0)
    assert short_of_kv.running == ["owed"], "for the medium one"
    assert short_of_kv.waiting == ["small", "medium", "borrowed", "free", "large"]


def test_from_its_deadline_on_nobody_passes_it_and_nothing_is_taken_for_those_behind(
    short_of_kv: FakeEngine,
) -> None:
    short_of_kv.arrange(now=3.0)
    assert short_of_kv.running == ["owed", "borrowed"]
    assert short_of_kv.waiting == ["large", "medium", "free"]


def test_what_each_gets_is_not_given_away_twice() -> None:
    engine = FakeEngine(slots=9, kv_blocks=100)
    engine.run("a", "b", tokens=40)
    engine.wait("x", "y", tokens=20)
    engine.arrange()
    assert engine.running == ["b"]


def test_who_is_not_ready_takes_nothing_yet_and_keeps_its_place() -> None:
    engine = FakeEngine(slots=2, kv_blocks=1_000)
    engine.run("a", "b")
    engine.wait("x", "y")
    engine.unready = {"x"}
    engine.arrange()
    assert engine.running == ["b"]
    assert engine.waiting == ["x", "y", "a"]


def test_nobody_gives_way_whose_kv_cache_cannot_be_taken_now() -> None:
    engine = FakeEngine(slots=2, kv_blocks=1_000)
    engine.run("a", "b")
    engine.fixed = {"a", "b"}
    engine.wait("x")
    engine.arrange()
    assert engine.running == ["a", "b"]
    assert engine.waiting == ["x"]


def test_owed_ones_do_not_give_way_to_each_other() -> None:
    engine = FakeEngine(slots=2, kv_blocks=1_000)
    engine.run("a", "b", seat="sold")
    engine.wait("x", "y")
    engine.arrange()
    assert engine.running == ["a", "b"]
    assert engine.waiting == ["x", "y"]


def test_prompts_are_served_last() -> None:
    engine = FakeEngine(slots=9, kv_blocks=1_000)
    engine.wait("long", seat="free", tokens=800)
    engine.waiting.remove("long")
    engine.running.append("long")
    engine.policy.composed({"long": 100}, 0.0)
    engine.policy.completed(0.1)
    engine.run("a", "b")
    assert engine.running == ["long", "a", "b"]
    engine.arrange()
    assert engine.running == ["a", "b", "long"]
