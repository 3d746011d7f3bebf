"""The VTC paper's measures of fairness, as its artifact computes them.

Service is input + 2 * output tokens, spread evenly from a request's first token to its end. Over windows of
60 s, with W_i a client's service and D_i the cost of what it sent in the window, both per second, the
*difference* at a moment is the sum over clients of `min(max_j W_j - W_i, |D_i - W_i|)`. The *gap* is the
largest less the smallest service by weight since the warm-up. Refused requests count as not sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.simulator.experiment import Played, Served

WINDOW_S = 60.0
WARM_UP_S = 30.0
TICKS = 19


@dataclass(frozen=True, slots=True)
class Shares:
    """How one policy shared a workload."""

    max_diff: float
    avg_diff: float
    """Cost per second."""
    max_gap: float
    """Cost by weight."""
    tok_s: float
    """Input and output tokens of served requests, over the whole time with the drain."""
    served: int


def shares(played: Played) -> Shares:
    """The measures of one run."""
    diffs = differences(played)
    done = [s for s in played.served if s.finished_at is not None]
    tokens = sum(s.request.input_tokens + s.request.output_tokens for s in done)
    return Shares(
        max_diff=max(diffs),
        avg_diff=sum(diffs) / len(diffs),
        max_gap=max(gap for _, gap in gaps(played)),
        tok_s=tokens / played.seconds,
        served=len(done),
    )


def ticks(played: Played) -> list[float]:
    """The moments that are looked at: 19 between the first second and the last arrival."""
    last = int(max(s.request.arrival_s for s in played.served))
    return [last / (TICKS + 1) * place for place in range(1, TICKS + 1)]


def differences(played: Played) -> list[float]:
    """The difference at each tick."""
    by_client = _by_client(played)
    return [_difference(by_client, at - WINDOW_S / 2 + WARM_UP_S) for at in ticks(played)]


def gaps(played: Played) -> list[tuple[float, float]]:
    """By tick: the accumulated gap between the best and the worst served, by weight."""
    by_client = _by_client(played)
    found = []
    for at in ticks(played):
        services = [
            sum(_service(s, WARM_UP_S, at + WARM_UP_S) for s in theirs) / played.workload.weight(client)
            for client, theirs in by_client.items()
        ]
        found.append((at, max(services) - min(services)))
    return found


def first_token_waits(played: Played, client: str) -> list[float]:
    """Seconds from arrival to first token of a client's served requests, in ascending order."""
    return sorted(
        s.first_token_at - s.request.arrival_s
        for s in played.served
        if s.request.client == client and s.first_token_at is not None
    )


def _by_client(played: Played) -> dict[str, list[Served]]:
    by_client: dict[str, list[Served]] = {client: [] for client in played.workload.clients}
    for served in played.served:
        if not served.refused:
            by_client[served.request.client].append(served)
    return by_client


def _difference(by_client: dict[str, list[Served]], begins: float) -> float:
    ends = begins + WINDOW_S
    got = [sum(_service(s, begins, ends) for s in theirs) / WINDOW_S for theirs in by_client.values()]
    sent = [
        sum(s.request.cost for s in theirs if begins <= s.request.arrival_s <= ends) / WINDOW_S
        for theirs in by_client.values()
    ]
    most = max(got)
    return sum(min(most - g, abs(d - g)) for g, d in zip(got, sent, strict=True))


def _service(served: Served, begins: float, ends: float) -> float:
    """Cost served between two moments."""
    if served.first_token_at is None or served.finished_at is None:
        return 0.0
    span = served.finished_at - served.first_token_at
    if span < 1e-5:
        return 0.0  # the artifact leaves out answers of one token, too
    overlap = min(ends, served.finished_at) - max(begins, served.first_token_at)
    return served.request.cost * max(0.0, overlap) / span


def percentile(ascending: Sequence[float], share: float) -> float:
    """The value below which `share` of the values lie, by nearest rank."""
    return ascending[min(len(ascending) - 1, int(share * len(ascending)))]
