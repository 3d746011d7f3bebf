"""What the step policy counts by difference is what counting each step one by one gives."""

import random
from collections import Counter
from collections.abc import Hashable

import pytest

from scheduler.streams import Decodes, StepSeat, Stream


class Slow:
    """Some streams of two seats, in random steps, counted one by one."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.decodes = Decodes()
        self.seats = {name: StepSeat(0.0, self.decodes) for name in ("sold", "free")}
        self.seats["sold"].guarantee_tok_s = 50.0
        self.streams: dict[Hashable, Stream] = {}
        self.computed: dict[Hashable, int] = {}
        self.made: Counter[tuple[str, bool]] = Counter()
        self.in_step: set[Hashable] = set()
        self.held: set[Hashable] = set()
        self.came = 0

    def come(self) -> None:
        self.came += 1
        name, seat = f"s{self.came}", self.seats[self.rng.choice(("sold", "free"))]
        stream = Stream(name, seat, self.rng.randint(1, 9), due=0.0)
        stream.known, stream.prefill_left = stream.prefill_left, 0
        self.streams[name] = seat.streams[name] = stream
        self.computed[name] = stream.known
        self.decodes.begin(stream)
        seat.classify()

    def go(self, name: Hashable) -> None:
        stream = self.streams.pop(name)
        self.decodes.end(stream)
        del stream.seat.streams[name], self.computed[name]
        self.in_step.discard(name)
        self.held.discard(name)
        stream.seat.classify()

    def hold(self) -> None:
        for name in self.rng.sample(list(self.streams), k=len(self.streams) // 3):
            if name in self.held:
                self.held.remove(name)
                self.decodes.release(self.streams[name])
            else:
                self.held.add(name)
                self.in_step.discard(name)
                self.decodes.hold(self.streams[name])

    def resell(self) -> None:
        self.seats["sold"].quantity = self.rng.randint(1, 4)
        self.seats["sold"].classify()

    def step(self) -> None:
        """Of all that are not held, but that the engine now and then passes some over."""
        passed_over = self.rng.choice((0.0, 0.0, 0.2))
        names = [name for name in self.streams if name not in self.held and self.rng.random() >= passed_over]
        self.decodes.advance(dict.fromkeys(names, 1), {})
        self.in_step = set(names)
        for name in names:
            self.computed[name] += 1
            stream = self.streams[name]
            self.made["sold" if stream.seat is self.seats["sold"] else "free", stream.owed] += 1

    def check(self) -> None:
        assert {name: stream.computed for name, stream in self.streams.items()} == self.computed
        assert self.decodes.count == len(self.streams)
        assert self.decodes.in_step == len(self.in_step)
        assert self.decodes.kv_tokens == sum(self.computed[name] for name in self.in_step)
        assert self.decodes.kv_tokens + self.decodes.resting_kv_tokens == sum(self.computed.values())


def test_a_held_or_unknown_sequence_in_a_step_is_an_error() -> None:
    slow = Slow(1)
    for _ in range(2):
        slow.come()
    held, free = slow.streams
    slow.decodes.hold(slow.streams[held])
    slow.decodes.advance({free: 1}, {})
    for wrong in ({held: 1, free: 1}, {free: 1, "unknown": 1}):
        with pytest.raises(AssertionError, match="held or unknown"):
            slow.decodes.advance(wrong, {})


@pytest.mark.parametrize("seed", range(20))
def test_counts_by_difference_are_those_of_each_step(seed: int) -> None:
    slow = Slow(seed)
    settled: Counter[tuple[str, bool]] = Counter()
    for _ in range(300):
        act = slow.rng.random()
        if act < 0.2 or not slow.streams:
            slow.come()
        elif act < 0.35:
            slow.go(slow.rng.choice(list(slow.streams)))
        elif act < 0.4:
            slow.resell()
        elif act < 0.5:
            slow.hold()
        elif act < 0.9:
            slow.step()
        else:
            for name, seat in slow.seats.items():
                owed, borrowed = seat.settle()
                settled.update({(name, True): owed, (name, False): borrowed})
            assert settled == slow.made
        slow.check()
