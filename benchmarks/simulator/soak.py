"""Many adversarial simulations in a row: does any oracle see a broken promise?"""

from __future__ import annotations

import gc
import signal
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

from benchmarks.simulator import trace
from benchmarks.simulator.adversaries import random_scenario
from benchmarks.simulator.oracles import MOST_REPORTED, Pace, Promised, all_oracles, violations
from benchmarks.simulator.simulation import Scenario, Simulation

SAY_EVERY = 1_000
PART = 25
"""Seeds that a process plays at a time."""


@dataclass(slots=True)
class Soak:
    """What a range of seeds has shown so far."""

    first: int
    simulations: int = 0
    asked: int = 0
    """Simulations that there should be: more than there are if it was stopped."""
    broken: list[str] = field(default_factory=list)
    """The first few broken promises, each with its seed."""
    broken_seeds: int = 0
    steps: int = 0
    held: int = 0
    """Simulations in which something was held."""
    preempted: int = 0
    """Simulations in which something was preempted."""
    pace_judged: int = 0
    """Simulations in which a seat had a guarantee that could be kept, so that its pace was judged."""
    pace_held: int = 0
    """Of these, simulations in which something was held,"""
    pace_slowed: int = 0
    """and in which the machine slowed down meanwhile."""
    seconds: float = 0.0

    def add(self, other: Soak) -> None:
        """Count what the seeds of `other` have shown."""
        self.simulations += other.simulations
        self.broken += other.broken[: max(0, MOST_REPORTED - len(self.broken))]
        self.broken_seeds += other.broken_seeds
        self.steps += other.steps
        self.held += other.held
        self.preempted += other.preempted
        self.pace_judged += other.pace_judged
        self.pace_held += other.pace_held
        self.pace_slowed += other.pace_slowed

    def summary(self) -> dict[str, object]:
        return asdict(self)


class Judgement(NamedTuple):
    """What the oracles say of a trace."""

    broken: list[str]
    """The promises that it breaks."""
    pace_judged: bool
    """Whether a seat had a guarantee that could be kept."""


def judged(scenario: Scenario, events: Sequence[trace.Event]) -> Judgement:
    """What the oracles say of a trace of the scenario."""
    policy = scenario.policy
    promised = Promised(
        queue_timeout_s=policy.queue_timeout_s,
        max_queued_per_seat=policy.max_queued_per_seat,
        initial_output_tokens=policy.initial_output_tokens,
    )
    oracles = all_oracles()
    broken = violations(events, promised, oracles)
    return Judgement(broken, any(isinstance(each, Pace) and each.judged for each in oracles))


def played(seed: int) -> tuple[Judgement, list[trace.Event]]:
    """The scenario of a seed: what the oracles say of it, and its trace."""
    scenario = random_scenario(seed)
    events = Simulation(scenario, seed).run()
    found = judged(scenario, events)
    return found._replace(broken=[f"{line} (seed {seed})" for line in found.broken]), events


def soak(first: int, count: int, say: Callable[[str], None], jobs: int) -> Soak:
    """Play `count` seeds from `first` on in `jobs` processes; goes on after a broken promise. Ctrl-C ends it
    with what has been seen by then."""
    found, began = Soak(first, asked=count), time.monotonic()
    parts = [range(seed, min(seed + PART, first + count)) for seed in range(first, first + count, PART)]
    executor = ProcessPoolExecutor(min(jobs, len(parts)), initializer=_begin)
    try:
        for part in executor.map(_play, parts):
            found.add(part)
            found.seconds = time.monotonic() - began
            for line in part.broken:
                say(line)
            if found.simulations % SAY_EVERY == 0:
                say(f"{found.simulations} of {count}: {found.broken_seeds} with a broken promise")
    except KeyboardInterrupt:
        say(f"stopped after {found.simulations} of {count}")
    finally:
        executor.shutdown(cancel_futures=True)
    return found


def _begin() -> None:
    # Ctrl-C is the parent's.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A trace is many objects that live to its end: looking for cycles among them took a seventh of the time.
    gc.disable()


def _play(seeds: range) -> Soak:
    gc.collect()
    found = Soak(seeds.start)
    for seed in seeds:
        try:
            (broken, pace_judged), events = played(seed)
        except Exception as error:
            broken, pace_judged, events = [f"crash: {error!r} (seed {seed})"], False, []
        composed = [event for event in events if isinstance(event, trace.Composed)]
        held = any(event.held for event in composed)
        preempted = any(event.preempted for event in composed)
        slowed = any(isinstance(event, trace.MachineChanged) and event.slowdown > 1.0 for event in events)
        # One line for each seed, or a noisy one would hide the others.
        found.add(
            Soak(
                seed,
                simulations=1,
                broken=broken[:1],
                broken_seeds=int(bool(broken)),
                steps=len(composed),
                held=held,
                preempted=preempted,
                pace_judged=pace_judged,
                pace_held=pace_judged and held,
                pace_slowed=pace_judged and slowed,
            )
        )
    return found
