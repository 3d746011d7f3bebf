"""The workloads of the VTC paper (Sheng et al., OSDI 2024): its synthetic suites and its real trace.

A suite is drawn with NumPy's legacy generator, seed 42, in the order in which the paper's artifact
(github.com/Ying1123/VTC-artifact, fair_bench/trace.py) draws, so that phases and gaps are the published ones.
"""

from __future__ import annotations

import csv
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

SEED = 42


@dataclass(frozen=True, slots=True)
class Request:
    """One request of one client. Lengths are in tokens, the output's is what it will really produce."""

    number: int
    client: str
    arrival_s: float
    input_tokens: int
    output_tokens: int

    @property
    def cost(self) -> float:
        """Service as the paper counts it: input + 2 * output."""
        return self.input_tokens + 2.0 * self.output_tokens


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests in order of arrival, and the pool of KV tokens that they meet."""

    name: str
    requests: tuple[Request, ...]
    weights: Mapping[str, float] = field(default_factory=dict)
    """By client; 1 where none is given."""
    kv_tokens: int = 10_000

    @property
    def clients(self) -> list[str]:
        return sorted({request.client for request in self.requests})

    def weight(self, client: str) -> float:
        return self.weights.get(client, 1.0)


# --- arrivals ----------------------------------------------------------------------------------------------

Draw = np.random.RandomState
Arrival = tuple[float, int]
"""Seconds, and the client's place in its suite."""


@dataclass(frozen=True, slots=True)
class Spaced:
    """Fixed gaps from a random phase; the first client may pause for every other `on_off_s`."""

    rates: tuple[float, ...]
    seconds: float
    on_off_s: float | None = None
    begins_s: float = 0.0

    def arrivals(self, draw: Draw) -> list[Arrival]:
        found = []
        for client, rate in enumerate(self.rates):
            at = self.begins_s + draw.rand() / rate
            for _ in range(int(rate * self.seconds)):
                at += 1 / rate
                if not (self.on_off_s and client == 0 and int(at // self.on_off_s) % 2):
                    found.append((at, client))
        return found


@dataclass(frozen=True, slots=True)
class Poisson:
    """Two clients that together are one Poisson stream."""

    rates: tuple[float, float]
    seconds: float

    def arrivals(self, draw: Draw) -> list[Arrival]:
        total = sum(self.rates)
        count = int(total * self.seconds)
        second = draw.rand(count) > self.rates[0] / total
        gaps = draw.gamma(1.0, 1.0 / total, count)
        return [(float(at), int(client)) for at, client in zip(np.cumsum(gaps), second, strict=True)]


@dataclass(frozen=True, slots=True)
class Increasing:
    """A steady client beside one whose rate grows linearly."""

    steady: float
    first: float
    last: float
    seconds: float

    def arrivals(self, draw: Draw) -> list[Arrival]:
        found = [((i + 1) / self.steady, 0) for i in range(int(self.steady * self.seconds))]
        at = 0.0
        for _ in range(int((self.first + self.last) / 2 * self.seconds)):
            at += 1 / (self.first + (self.last - self.first) * at / self.seconds)
            found.append((at, 1))
        return found


@dataclass(frozen=True, slots=True)
class Phases:
    """One pattern after the other."""

    parts: tuple[Spaced, ...]

    def arrivals(self, draw: Draw) -> list[Arrival]:
        return [arrival for part in self.parts for arrival in part.arrivals(draw)]


@dataclass(frozen=True, slots=True)
class Suite:
    """Arrivals, and for each client its mean input and output tokens."""

    pattern: Spaced | Poisson | Increasing | Phases
    lengths: tuple[tuple[int, int], ...] = ((256, 256),)
    """Of all clients, or one for each."""
    weights: tuple[float, ...] = ()
    kv_tokens: int = 10_000


SUITES: dict[str, Suite] = {
    "overload": Suite(Spaced((1.5, 3.0), 360)),
    "overload-multi": Suite(Spaced((0.4,) * 3 + (0.6,) * 5, 360)),
    "overload-weighted": Suite(Spaced((0.8, 0.8, 1.2, 1.6), 360), weights=(1, 2, 3, 4)),
    "proportional": Suite(Spaced((0.25, 0.5, 1.5), 600)),
    "on_off_less": Suite(Spaced((0.5, 2.0), 600, on_off_s=60)),
    "on_off_overload": Suite(Spaced((2.0, 3.0), 600, on_off_s=60)),
    "poisson_short_long": Suite(Poisson((8.0, 1.5), 600), ((64, 64), (256, 256))),
    "poisson_short_long_2": Suite(Poisson((8.0, 1.5), 600), ((512, 32), (32, 512))),
    "increase": Suite(Increasing(0.5, 0.2, 2.0, 600)),
    "dist_shift": Suite(
        Phases(
            (
                Spaced((0.5, 2.0), 300, on_off_s=60),
                Spaced((1.0, 1.0), 300, begins_s=300),
                Spaced((0.5, 1.5), 300, begins_s=600),
            )
        )
    ),
    "13B-256": Suite(Spaced((3.0, 6.0), 600), kv_tokens=35_000),
    "13B-512": Suite(Spaced((1.5, 3.0), 600), ((512, 512),), kv_tokens=35_000),
    "13B-768": Suite(Spaced((1.0, 2.0), 600), ((768, 768),), kv_tokens=35_000),
}
"""The paper's suites. Rates are requests per second, times seconds."""


def suite(name: str) -> Workload:
    """One of `SUITES`, with the constant lengths that it was published with."""
    plan = SUITES[name]
    requests: list[Request] = []
    for at, client in sorted(plan.pattern.arrivals(Draw(SEED))):
        input_tokens, output_tokens = plan.lengths[client % len(plan.lengths)]
        requests.append(Request(len(requests), f"client{client}", at, input_tokens, output_tokens))
    weights = {f"client{client}": weight for client, weight in enumerate(plan.weights)}
    return Workload(name, tuple(requests), weights, plan.kv_tokens)


# --- lengths -----------------------------------------------------------------------------------------------


def _constant(mean: int, _rng: random.Random) -> int:
    return mean


def _uniform(mean: int, rng: random.Random) -> int:
    return rng.randint(1, 2 * mean - 1)


def _heavy(mean: int, rng: random.Random) -> int:
    """Log-normal with sigma 1, of the same mean, cut at eight times the mean (the 99.5th percentile)."""
    return max(1, min(8 * mean, round(rng.lognormvariate(math.log(mean) - 0.5, 1.0))))


LENGTHS: dict[str, Callable[[int, random.Random], int]] = {
    "constant": _constant,
    "uniform": _uniform,
    "heavy": _heavy,
}
"""Laws of lengths with a given mean: the paper's, 1 to 2 * mean - 1, and a long tail."""


def with_lengths(workload: Workload, law: str, seed: int) -> Workload:
    """The same arrivals with other lengths of the same means, drawn anew for each request."""
    rng = random.Random(f"{workload.name}/{law}/{seed}")
    draw = LENGTHS[law]
    requests = tuple(
        replace(
            request,
            input_tokens=draw(request.input_tokens, rng),
            output_tokens=draw(request.output_tokens, rng),
        )
        for request in workload.requests
    )
    return replace(workload, requests=requests)


# --- the real trace ----------------------------------------------------------------------------------------


def read_trace(path: Path) -> Workload:
    """The trace of 27 clients of LMSYS Chatbot Arena. Raises OSError if the file is not there.

    The file has the columns `arrival_s,input_tokens,output_tokens,tenant_id`.
    """
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return Workload("arena", _from_rows(rows))


def _from_rows(rows: Sequence[Mapping[str, str]]) -> tuple[Request, ...]:
    return tuple(
        Request(
            number,
            row["tenant_id"],
            float(row["arrival_s"]),
            int(row["input_tokens"]),
            int(row["output_tokens"]),
        )
        for number, row in enumerate(rows)
    )
