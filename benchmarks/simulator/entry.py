"""Who enters the engine next: the policies that are compared, behind one interface.

Each is told what arrives and what the engine does, and is asked who enters whenever the engine could take
somebody. The published ones follow the VTC paper (Sheng et al., OSDI 2024) and its artifact; `Ours` is the
scheduler that production runs, unchanged.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Protocol

from benchmarks.simulator.workloads import Request
from scheduler import Admission, Ask, Capacity, Policy, Refusal, SeatTerms, Ticket

Fits = Callable[[Request], bool]
"""Whether the engine has room for one more; a yes takes the room."""
Take = Callable[[Fits], list[Request]]
"""Those who enter now: a policy's `enter`, its clock set."""
UNLIMITED = 1_000_000_000


class EntryPolicy(Protocol):
    """One order of entry. Calls come in order of time; `now` is in seconds.

    Contract: a request that `submit` accepts is returned by `enter` exactly once, and one that it refuses
    never. A policy with `conserves_work` refuses nothing, and goes on returning somebody while `fits` would
    take each of those whom it has: one that does not fit may hold up the others, if it is his turn.
    """

    name: str
    conserves_work: bool

    def submit(self, request: Request, now: float) -> bool:
        """Queue a request; False if it is refused."""

    def enter(self, fits: Fits, now: float) -> list[Request]:
        """Those who enter now, in order."""

    def produced(self, tokens: Iterable[tuple[Request, int]], now: float) -> None:
        """The engine made output tokens."""

    def finished(self, request: Request, now: float) -> None:
        """A request that entered is complete."""


class Fcfs:
    """First come, first served."""

    name = "FCFS"
    conserves_work = True

    def __init__(self) -> None:
        self._queue: deque[Request] = deque()

    def submit(self, request: Request, now: float) -> bool:
        self._queue.append(request)
        return True

    def enter(self, fits: Fits, now: float) -> list[Request]:
        entering = []
        while self._queue and fits(self._queue[0]):
            entering.append(self._queue.popleft())
        return entering

    def produced(self, tokens: Iterable[tuple[Request, int]], now: float) -> None:
        """Nothing is counted."""

    def finished(self, request: Request, now: float) -> None:
        """Nothing is counted."""


class Rpm(Fcfs):
    """First come, first served, for those with fewer than `limit` accepted requests in the last minute."""

    conserves_work = False

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.name = f"RPM {limit}"
        self._limit = limit
        self._accepted: dict[str, deque[float]] = {}

    def submit(self, request: Request, now: float) -> bool:
        accepted = self._accepted.setdefault(request.client, deque())
        while accepted and now - accepted[0] > 60.0:
            accepted.popleft()
        if len(accepted) >= self._limit:
            return False
        accepted.append(now)
        return super().submit(request, now)


class Vtc:
    """Virtual Token Counter: the queued client with the smallest counter enters first.

    A counter grows by the input at entry and by 2 for each output token, by weight. A client whose queue was
    empty is lifted to the smallest counter of those that are queued; nobody is lifted if nobody is queued.
    """

    name = "VTC"
    conserves_work = True
    lifts = True

    def __init__(self, weights: Mapping[str, float]) -> None:
        self._weights = weights
        self._counters: dict[str, float] = {}
        self._queues: dict[str, deque[Request]] = {}

    def submit(self, request: Request, now: float) -> bool:
        client = request.client
        self._counters.setdefault(client, 0.0)
        queue = self._queues.setdefault(client, deque())
        if not queue and self.lifts:
            queued = [self._counters[other] for other, waiting in self._queues.items() if waiting]
            if queued:
                self._counters[client] = max(self._counters[client], min(queued))
        queue.append(request)
        return True

    def enter(self, fits: Fits, now: float) -> list[Request]:
        entering = []
        while True:
            queued = [client for client, waiting in self._queues.items() if waiting]
            if not queued:
                break
            queue = self._queues[min(queued, key=self._counters.__getitem__)]
            if not fits(queue[0]):
                break
            request = queue.popleft()
            self._charge(request.client, self.entry_cost(request))
            entering.append(request)
        return entering

    def produced(self, tokens: Iterable[tuple[Request, int]], now: float) -> None:
        for request, made in tokens:
            self._charge(request.client, 2.0 * made)

    def finished(self, request: Request, now: float) -> None:
        """All has been charged by now."""

    def entry_cost(self, request: Request) -> float:
        return float(request.input_tokens)

    def _charge(self, client: str, cost: float) -> None:
        self._counters[client] += cost / self._weights.get(client, 1.0)


class Lcf(Vtc):
    """Least counter first: VTC without the lift, so that idle time is saved up."""

    name = "LCF"
    lifts = False


class VtcOracle(Vtc):
    """VTC that knows every output's length and charges it at entry."""

    name = "VTC oracle"

    def entry_cost(self, request: Request) -> float:
        return request.cost

    def produced(self, tokens: Iterable[tuple[Request, int]], now: float) -> None:
        """All was charged at entry."""


class VtcPredicted(Vtc):
    """VTC that is told each output's length within 50 %, charges that at entry, and the rest as it comes or
    back at the end."""

    name = "VTC predicted"

    def __init__(self, weights: Mapping[str, float]) -> None:
        super().__init__(weights)
        self._rng = random.Random(0)
        self._foreseen: dict[int, float] = {}
        """Output tokens charged and not made yet, by request in the engine."""

    def entry_cost(self, request: Request) -> float:
        foreseen = self._foreseen[request.number] = request.output_tokens * self._rng.uniform(0.5, 1.5)
        return request.input_tokens + 2.0 * foreseen

    def produced(self, tokens: Iterable[tuple[Request, int]], now: float) -> None:
        for request, made in tokens:
            foreseen = self._foreseen[request.number]
            self._foreseen[request.number] = max(0.0, foreseen - made)
            self._charge(request.client, 2.0 * max(0.0, made - foreseen))

    def finished(self, request: Request, now: float) -> None:
        self._charge(request.client, -2.0 * self._foreseen.pop(request.number))


class Ours:
    """The production `Admission`: a seat for each client, its quantity the weight, and no guarantee sold.

    It keeps its own account of the engine's slots and KV cache, by what it expects of lengths, and does not
    ask `fits`: what it lets in and the engine has no room for yet waits there, as it does in vLLM. It
    conserves work by that account alone: KV cache that it expects to be needed stays free until it is.
    """

    name = "ours"
    conserves_work = False

    def __init__(
        self, weights: Mapping[str, float], capacity: Capacity, policy: Policy | None = None
    ) -> None:
        # The paper's clients wait for as long as it takes.
        self._admission = Admission(
            capacity, policy or Policy(queue_timeout_s=UNLIMITED, max_queued_per_seat=UNLIMITED)
        )
        self._weights = weights
        self._requests: dict[int, Request] = {}
        self._tickets: dict[int, Ticket] = {}

    def submit(self, request: Request, now: float) -> bool:
        if not self._admission.knows(request.client):
            quantity = round(self._weights.get(request.client, 1.0))
            terms = SeatTerms(request.client, quantity, 0.0, UNLIMITED, UNLIMITED, UNLIMITED)
            self._admission.open_seat(terms, now)
        # What the client allows at most says little: enough for the longest answers of all workloads.
        answer = self._admission.submit(request.client, [Ask(request.input_tokens, 8_192)], now)
        if isinstance(answer, Refusal):
            return False
        [ticket] = answer
        self._requests[ticket.number] = request
        self._tickets[request.number] = ticket
        return True

    def enter(self, fits: Fits, now: float) -> list[Request]:
        return [self._requests[ticket.number] for ticket in self._admission.dispatch(now)]

    def produced(self, tokens: Iterable[tuple[Request, int]], now: float) -> None:
        self._admission.record_step([(self._tickets[request.number], made) for request, made in tokens], now)

    def finished(self, request: Request, now: float) -> None:
        self._admission.release(self._tickets[request.number], now)


RPM_LIMITS = (5, 10, 15, 20, 30)
"""Requests per minute that the paper tried."""


def published(weights: Mapping[str, float]) -> dict[str, Callable[[], EntryPolicy]]:
    """How to make the policies whose figures are published, by name; each run needs a new one."""
    makers: dict[str, Callable[[], EntryPolicy]] = {
        "FCFS": Fcfs,
        "LCF": partial(Lcf, weights),
        "VTC": partial(Vtc, weights),
        "VTC predicted": partial(VtcPredicted, weights),
        "VTC oracle": partial(VtcOracle, weights),
    }
    return makers | {f"RPM {limit}": partial(Rpm, limit) for limit in RPM_LIMITS}
