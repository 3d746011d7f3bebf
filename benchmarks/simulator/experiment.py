"""Plays a workload against an engine and a policy, and keeps what became of every request."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

from benchmarks.simulator.entry import EntryPolicy, Take
from benchmarks.simulator.workloads import Request, Workload


class Batch(Protocol):
    """One composed step of an engine."""

    @property
    def seconds(self) -> float: ...


B = TypeVar("B", bound=Batch)


class Engine(Protocol[B]):
    """What an experiment needs of an engine. Steps are completed in the order in which they were composed."""

    batches_in_flight: int
    """Steps that may be composed before the first of them has ended."""

    def compose(self, take: Take, now: float) -> B | None:
        """The next step, or None if there is nothing to do; `take` gives the requests that enter."""

    def complete(self, batch: B, now: float) -> tuple[list[tuple[Request, int]], list[Request]]:
        """Do a step: the output tokens it made, by request, and the requests that are complete."""


@dataclass(slots=True)
class Served:
    """What became of one request; times in seconds of the simulation's clock."""

    request: Request
    refused: bool = False
    first_token_at: float | None = None
    finished_at: float | None = None


@dataclass(frozen=True, slots=True)
class Played:
    """One workload under one policy, to the end of the last request."""

    workload: Workload
    policy: str
    served: tuple[Served, ...]
    """In order of arrival."""
    seconds: float
    steps: int


def play(workload: Workload, policy: EntryPolicy, engine: Engine[B]) -> Played:
    """Let all requests arrive, and the engine work until nothing is left."""
    served = {request.number: Served(request) for request in workload.requests}
    arrivals = deque(workload.requests)
    in_flight: deque[tuple[float, B]] = deque()
    now, steps = 0.0, 0

    def compose() -> None:
        nonlocal steps
        while len(in_flight) < engine.batches_in_flight:
            batch = engine.compose(partial(policy.enter, now=now), now)
            if batch is None:
                return
            steps += 1
            begins = in_flight[-1][0] if in_flight else now
            in_flight.append((begins + batch.seconds, batch))

    while arrivals or in_flight:
        if arrivals and (not in_flight or arrivals[0].arrival_s <= in_flight[0][0]):
            request = arrivals.popleft()
            now = request.arrival_s
            served[request.number].refused = not policy.submit(request, now)
        else:
            now, batch = in_flight.popleft()
            made, done = engine.complete(batch, now)
            policy.produced(made, now)
            for request, _ in made:
                if served[request.number].first_token_at is None:
                    served[request.number].first_token_at = now
            for request in done:
                served[request.number].finished_at = now
                policy.finished(request, now)
        compose()
    return Played(workload, policy.name, tuple(served.values()), now, steps)
