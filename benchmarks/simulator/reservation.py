"""The engine of the VTC paper's artifact (S-LoRA on LightLLM), by its batching rules.

Not vLLM: prompts of new requests are prefilled together in a step of their own while decodes stand still;
new requests are looked for only when the engine is empty or after ten decode steps; and a request enters
only if the KV pool will hold everybody to the end, computed from exact output lengths. So nothing is ever
preempted.
"""

from __future__ import annotations

import random
from bisect import insort
from collections import deque
from dataclasses import dataclass

from benchmarks.simulator.entry import Take
from benchmarks.simulator.workloads import Request
from contract.step_time import StepTime

DECODES_BETWEEN_ENTRIES = 10
NOISE = 0.02
"""Standard deviation of a step's time around the model's, relatively."""
MOST_PREFILL_TOKENS = 3_072
"""Prompt tokens in one prefill step: the artifact's default for a pool of 10,000."""


@dataclass(slots=True)
class Running:
    """A request in the engine."""

    request: Request
    made: int = 0

    @property
    def held(self) -> int:
        """KV tokens that it holds."""
        return self.request.input_tokens + self.made

    @property
    def left(self) -> int:
        return self.request.output_tokens - self.made - 1


@dataclass(frozen=True, slots=True)
class Batch:
    """One step: those who make a token in it."""

    seconds: float
    running: tuple[Running, ...]


class ReservationEngine:
    """One engine with a pool of `kv_tokens`.

    Invariant: the tokens held never exceed the pool.
    """

    batches_in_flight = 1

    def __init__(self, step_time: StepTime, kv_tokens: int, *, noise_seed: int | None = None) -> None:
        """`noise_seed`: let each step take a little more or less than the model says."""
        self._step_time = step_time
        self._noise = None if noise_seed is None else random.Random(noise_seed)
        self._kv_tokens = kv_tokens
        self._running: list[Running] = []
        self._waiting: deque[Request] = deque()
        """Let in by a policy that does not ask whether there is room."""
        self._decodes = 0

    @property
    def kv_in_use(self) -> int:
        return sum(running.held for running in self._running)

    def compose(self, take: Take, now: float) -> Batch | None:
        """The next step, or None if there is nothing to do. `take` gives those who enter."""
        if not self._running or self._decodes >= DECODES_BETWEEN_ENTRIES:
            entering = self._entering(take)
            if entering:
                self._decodes = 0
                self._running += entering
                tokens = sum(new.request.input_tokens for new in entering)
                return self._batch(tokens, 0, 0, entering)
        if not self._running:
            return None
        self._decodes += 1
        return self._batch(0, len(self._running), self.kv_in_use, self._running)

    def complete(self, batch: Batch, now: float) -> tuple[list[tuple[Request, int]], list[Request]]:
        """Do a composed step: the tokens it made, by request, and the requests that are complete."""
        for running in batch.running:
            running.made += 1
        done = [r.request for r in batch.running if r.made >= r.request.output_tokens]
        if done:
            self._running = [r for r in self._running if r.made < r.request.output_tokens]
        assert self.kv_in_use <= self._kv_tokens
        return [(running.request, 1) for running in batch.running], done

    def _batch(self, prefill: int, decodes: int, kv_tokens: int, running: list[Running]) -> Batch:
        seconds = self._step_time.seconds(prefill, decodes, kv_tokens)
        if self._noise is not None:
            seconds *= max(0.5, self._noise.gauss(1.0, NOISE))
        return Batch(seconds, tuple(running))

    def _entering(self, take: Take) -> list[Running]:
        room = _Room(self._running, self._kv_tokens)
        entering: list[Request] = []
        while self._waiting and room.fits(self._waiting[0]):
            entering.append(self._waiting.popleft())
        accepted: set[int] = set()

        def fits(request: Request) -> bool:
            if self._waiting or not room.fits(request):
                return False
            accepted.add(request.number)
            return True

        for request in take(fits):
            if request.number in accepted or fits(request):
                entering.append(request)
            else:
                self._waiting.append(request)
        return [Running(request) for request in entering]


class _Room:
    """Whether the pool holds everybody to the end, as the artifact reckons it.

    Sort by what is left to make, longest first: when the i-th is about to end, the first i hold what they
    hold now and each has grown by the i-th's rest.
    """

    def __init__(self, running: list[Running], kv_tokens: int) -> None:
        self._pool = kv_tokens
        self._prefill = 0
        self._ends = sorted((-running.left, running.held) for running in running)

    def fits(self, request: Request) -> bool:
        """Whether one more fits; if so it has the room from now on."""
        if self._prefill + request.input_tokens > MOST_PREFILL_TOKENS:
            return False
        entry = (1 - request.output_tokens, request.input_tokens + 1)
        insort(self._ends, entry)
        if self._peak() >= self._pool:
            self._ends.remove(entry)
            return False
        self._prefill += request.input_tokens
        return True

    def _peak(self) -> int:
        held = peak = 0
        for place, (minus_left, tokens) in enumerate(self._ends, start=1):
            held += tokens
            peak = max(peak, held - minus_left * place)
        return peak
