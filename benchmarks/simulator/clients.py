"""Simulated clients: when they send, and what."""

from __future__ import annotations

import random
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Shape:
    """The requests of one client; ranges are drawn from uniformly, ends included."""

    input_tokens: tuple[int, int] = (16, 64)
    output_tokens: tuple[int, int] = (4, 24)
    """Tokens that each sequence really produces."""
    max_tokens: int = 64
    """What the client asks for at most; outputs are cut there."""
    count: int = 1
    """`n` of each prompt."""
    prompts: int = 1
    """Prompts in each request."""
    cached_share: float = 0.0
    """Share of each prompt that the prefix cache has."""
    cancel_share: float = 0.0
    """Share of requests whose client leaves early."""
    patience_s: float = 0.5
    """Such a client leaves after at most this long."""


@dataclass(frozen=True, slots=True)
class OpenLoop:
    """Poisson arrivals, whatever becomes of earlier requests."""

    rate_per_s: float


@dataclass(frozen=True, slots=True)
class OnOff:
    """Poisson arrivals during `on_s`, then silence for `off_s`, and again."""

    rate_per_s: float
    on_s: float
    off_s: float


@dataclass(frozen=True, slots=True)
class ClosedLoop:
    """`connections` that each send their next request `think_s` after the last one ended."""

    connections: int
    think_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Client:
    """One client of one seat, present from `start_s` to `end_s`."""

    seat_id: str
    arrivals: OpenLoop | OnOff | ClosedLoop
    shape: Shape = field(default_factory=Shape)
    start_s: float = 0.0
    end_s: float = 10.0
    retries: bool = False
    """Repeat a refused request at the very moment its `retry_after_s` names."""


def next_arrival(arrivals: OpenLoop | OnOff, since_start_s: float, rng: random.Random) -> float:
    """Seconds from now to the next request of an open-loop client."""
    gap = rng.expovariate(arrivals.rate_per_s)
    if isinstance(arrivals, OpenLoop):
        return gap
    cycle = arrivals.on_s + arrivals.off_s
    into_cycle = since_start_s % cycle
    if into_cycle + gap < arrivals.on_s:
        return gap
    return cycle - into_cycle + gap % arrivals.on_s
