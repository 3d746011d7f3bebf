"""An asyncio load generator for OpenAI streaming completions.

It often shares the machine with the server that it measures, so it does little per chunk: it notes the
time and keeps the last kilobytes of the stream. Usage is read only when a count is wanted: at the ends of the
measuring window and at the end of a request.

Times are seconds since the phase began.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import aiohttp

from benchmarks.completions import (
    PROMPT_TOKEN_IDS,
    StreamTail,
    Target,
    completion_body,
    post_completion,
)


@dataclass(frozen=True, slots=True)
class Lengths:
    """Token counts drawn evenly from `low` to `high`, both included."""

    low: int
    high: int

    def __post_init__(self) -> None:
        if not 1 <= self.low <= self.high:
            raise ValueError(f"lengths need 1 <= low <= high, got {self}")

    def draw(self, rng: random.Random) -> int:
        return rng.randint(self.low, self.high)


@dataclass(frozen=True, slots=True)
class Visits:
    """A client that comes and goes: idle for `idle_s`, then busy for `busy_s`, again and again."""

    idle_s: float
    busy_s: float

    def starts(self) -> Iterator[float]:
        """When each visit begins, s since the phase began; endless."""
        return (self.idle_s + number * (self.idle_s + self.busy_s) for number in itertools.count())


@dataclass(frozen=True, slots=True)
class ClosedLoop:
    """`connections` streams that each send the next request as soon as the last one ended."""

    name: str
    target: Target
    connections: int
    input_tokens: Lengths
    output_tokens: Lengths
    seed: str
    max_requests: int = 100_000
    """In each visit, if there are visits."""
    visits: Visits | None = None
    """When it is there; None for always. What runs when a visit ends is canceled."""
    timeline: bool = False
    """Whether its requests' records keep when each token came: for a few streams, not for a crowd."""


@dataclass(frozen=True, slots=True)
class Paced:
    """Requests at given moments, whether or not earlier ones have been answered."""

    name: str
    target: Target
    interval_s: float
    input_tokens: Lengths
    output_tokens: Lengths
    seed: str
    pacing: Literal["poisson", "fixed", "jittered"] = "poisson"
    """Jittered intervals are between half and one and a half of `interval_s`."""
    max_requests: int = 10_000
    awaited: bool = True
    """Whether the phase ends only when its open requests are answered."""

    def due_times(self) -> Iterator[float]:
        """Moments to send at, s since the phase began; `max_requests` of them."""
        rng = random.Random(f"{self.seed}/{self.name}/pace")
        due_s = 0.0
        for _ in range(self.max_requests):
            due_s += self.interval_s * self._interval(rng)
            yield due_s

    def _interval(self, rng: random.Random) -> float:
        match self.pacing:
            case "poisson":
                return rng.expovariate(1.0)
            case "jittered":
                return rng.uniform(0.5, 1.5)
            case "fixed":
                return 1.0


Client = ClosedLoop | Paced


@dataclass(slots=True)
class RequestRecord:
    """One request as its client saw it."""

    client: str
    due_s: float
    """When it should have been sent: `sent_s` later than this is the load generator's own delay."""
    sent_s: float
    input_tokens: int
    max_tokens: int
    first_token_s: float | None = None
    last_token_s: float | None = None
    finished_s: float | None = None
    output_tokens: int = 0
    """By the server's usage."""
    max_gap_s: float = 0.0
    """Longest wait between two reads of its tokens."""
    status: int = 0
    """HTTP status; 0 if there was no answer."""
    error: str | None = None
    retry_after_s: float | None = None
    cut: bool = False
    """Still running when the phase or the visit ended, and canceled by the client."""
    timeline: list[tuple[float, int]] | None = None
    """When tokens were read and how many there were by then, in order; None where it is not kept."""

    @property
    def ok(self) -> bool:
        return self.error is None and not self.cut

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_token_s is None else self.first_token_s - self.sent_s

    @property
    def decode_tok_s(self) -> float | None:
        """Rate after the first token; None for requests too short to have one."""
        if self.first_token_s is None or self.last_token_s is None or self.output_tokens < 2:
            return None
        elapsed_s = self.last_token_s - self.first_token_s
        return (self.output_tokens - 1) / elapsed_s if elapsed_s > 0 else None


@dataclass(frozen=True, slots=True)
class Served:
    """Tokens one client was served within the measuring window."""

    input_tokens: int
    """Of requests whose first token came within the window."""
    output_tokens: int

    def cost(self, input_weight: float = 1.0, output_weight: float = 2.0) -> float:
        """What the fair queue would charge for it."""
        return input_weight * self.input_tokens + output_weight * self.output_tokens

    def __sub__(self, earlier: Served) -> Served:
        return Served(
            self.input_tokens - earlier.input_tokens,
            self.output_tokens - earlier.output_tokens,
        )


@dataclass(frozen=True, slots=True)
class Sample:
    """What every client had been served by a moment, since the phase began."""

    at_s: float
    served: dict[str, Served]


@dataclass(frozen=True, slots=True)
class Phase:
    """What happened from `start_s` to `end_s`, the measuring window, and around it."""

    start_s: float
    end_s: float
    served: dict[str, Served]
    """By client name."""
    records: list[RequestRecord]
    """Of every request, warm-up included, in the order in which they ended."""
    max_lag_s: float = 0.0
    """Longest time for which the load generator itself did not get to run."""
    samples: list[Sample] = field(default_factory=list)
    """Of the whole phase, warm-up included, where they were asked for."""

    @property
    def window_s(self) -> float:
        return self.end_s - self.start_s

    def output_tok_s(self, client: str) -> float:
        return self.served[client].output_tokens / self.window_s

    def of(self, client: str) -> list[RequestRecord]:
        """The client's requests that were due within the window."""
        return [r for r in self.records if r.client == client and self.start_s <= r.due_s < self.end_s]


@dataclass(slots=True)
class _Meter:
    """One client's running totals, and the streams whose output is not in them yet."""

    input_tokens: int = 0
    output_tokens: int = 0
    live: set[StreamTail] = field(default_factory=set)

    def read(self) -> Served:
        in_flight = sum(tail.output_tokens() for tail in self.live)
        return Served(self.input_tokens, self.output_tokens + in_flight)


@contextlib.contextmanager
def _short_collections() -> Iterator[None]:
    """Keep Python's garbage collector from what is there already.

    Once in a while it goes through all objects, torch's and earlier phases' records included, and the
    generator stood still for 0.2 to 0.4 s.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


async def run_phase(
    clients: Sequence[Client],
    *,
    warm_s: float,
    window_s: float,
    drain_s: float = 30.0,
    max_records: int = 200_000,
    sample_s: float | None = None,
) -> Phase:
    """Let all clients run for `warm_s + window_s` and measure the latter part.

    After that the awaited clients' open requests have `drain_s` to be answered, beside the others which
    go on; whatever is left then is canceled and marked `cut`. At most `max_records` are kept. With
    `sample_s` what was served is noted every so many seconds.

    Raises ValueError when two clients share a name.
    """
    if len({client.name for client in clients}) != len(clients):
        raise ValueError("each client of a phase needs a name of its own")
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=120)
    with _short_collections():
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), timeout=timeout, auto_decompress=False
        ) as session:
            run = _PhaseRun(session, max_records)
            meters = {client.name: run.meters.setdefault(client.name, _Meter()) for client in clients}
            closed = [
                asyncio.create_task(run.closed_stream(client, stream))
                for client in clients
                if isinstance(client, ClosedLoop)
                for stream in range(client.connections)
            ]
            paced = {
                asyncio.create_task(run.paced_stream(client, warm_s + window_s)): client
                for client in clients
                if isinstance(client, Paced)
            }
            awaited = [task for task, client in paced.items() if client.awaited]
            watches = [asyncio.create_task(run.watch_own_lag())]
            if sample_s is not None:
                watches.append(asyncio.create_task(run.take_samples(sample_s)))
            try:
                await asyncio.sleep(warm_s - run.now())
                start_s, before = run.now(), {name: meter.read() for name, meter in meters.items()}
                await asyncio.sleep(warm_s + window_s - run.now())
                end_s, after = run.now(), {name: meter.read() for name, meter in meters.items()}
                if awaited:
                    await asyncio.wait(awaited, timeout=drain_s)
            finally:
                tasks = [*watches, *closed, *paced]
                for task in tasks:
                    task.cancel()
                ended = await asyncio.gather(*tasks, return_exceptions=True)
    for failure in ended:
        # What a server does wrong is in the records; anything else is a defect of the load generator.
        if isinstance(failure, Exception):
            raise failure
    served = {name: after[name] - before[name] for name in meters}
    return Phase(start_s, end_s, served, run.records, run.max_lag_s, run.samples)


class _PhaseRun:
    """The moving parts of one phase: its clock, session, meters and records."""

    def __init__(self, session: aiohttp.ClientSession, max_records: int) -> None:
        self._session = session
        self._loop = asyncio.get_running_loop()
        self._began = self._loop.time()
        self._max_records = max_records
        self.meters: dict[str, _Meter] = {}
        self.records: list[RequestRecord] = []
        self.samples: list[Sample] = []
        self.max_lag_s = 0.0

    def now(self) -> float:
        return self._loop.time() - self._began

    async def watch_own_lag(self, tick_s: float = 0.05) -> None:
        """Note how late this task wakes: figures taken while the generator starved are not the server's."""
        while True:
            asleep = self.now()
            await asyncio.sleep(tick_s)
            self.max_lag_s = max(self.max_lag_s, self.now() - asleep - tick_s)

    async def take_samples(self, every_s: float) -> None:
        while True:
            served = {name: meter.read() for name, meter in self.meters.items()}
            self.samples.append(Sample(self.now(), served))
            await asyncio.sleep(every_s - self.now() % every_s)

    async def closed_stream(self, client: ClosedLoop, stream: int) -> None:
        rng = random.Random(f"{client.seed}/{client.name}/{stream}")
        if client.visits is None:
            await self._one_after_another(client, rng)
            return
        for start_s in client.visits.starts():
            await asyncio.sleep(start_s - self.now())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(client.visits.busy_s):
                    await self._one_after_another(client, rng)

    async def _one_after_another(self, client: ClosedLoop, rng: random.Random) -> None:
        for _ in range(max(1, client.max_requests // client.connections)):
            record = await self._request(client, rng, due_s=self.now())
            if not record.ok:
                # A refused client that comes straight back would measure the refusals' cost.
                await asyncio.sleep(min(record.retry_after_s or 0.2, 1.0))

    async def paced_stream(self, client: Paced, until_s: float) -> None:
        rng = random.Random(f"{client.seed}/{client.name}")
        async with asyncio.TaskGroup() as open_requests:
            for due_s in client.due_times():
                if due_s >= until_s:
                    break
                await asyncio.sleep(due_s - self.now())
                open_requests.create_task(self._request(client, rng, due_s))

    async def _request(self, client: Client, rng: random.Random, due_s: float) -> RequestRecord:
        """Send one request, read it to its end and record it, also when it is canceled meanwhile."""
        prompt = rng.choices(PROMPT_TOKEN_IDS, k=client.input_tokens.draw(rng))
        max_tokens = client.output_tokens.draw(rng)
        body = completion_body(client.target.model, prompt, max_tokens)
        meter, tail = self.meters[client.name], StreamTail()
        record = RequestRecord(client.name, due_s, self.now(), len(prompt), max_tokens)
        if isinstance(client, ClosedLoop) and client.timeline:
            record.timeline = []
        meter.live.add(tail)
        try:
            await self._exchange(client.target, body, record, tail, meter)
        except asyncio.CancelledError:
            record.cut = True
            raise
        except (aiohttp.ClientError, TimeoutError, OSError) as failure:
            record.error = f"{type(failure).__name__}: {failure}"
        finally:
            record.finished_s = self.now()
            record.output_tokens = tail.output_tokens()
            meter.live.discard(tail)
            meter.output_tokens += record.output_tokens
            if len(self.records) < self._max_records:
                self.records.append(record)
        return record

    async def _exchange(
        self, target: Target, body: bytes, record: RequestRecord, tail: StreamTail, meter: _Meter
    ) -> None:
        async with post_completion(self._session, target, body) as answer:
            record.status = answer.status
            record.retry_after_s = _seconds(answer.headers.get("retry-after"))
            if answer.status != 200:
                record.error = (await answer.text())[:500] or f"HTTP {answer.status}"
                return
            await self._read_stream(answer.content, record, tail, meter)
        if tail.output_tokens() == 0 or record.first_token_s is None:
            record.error = tail.error() or "the stream ended without a token"
        elif tail.output_tokens() < record.max_tokens:
            record.error = tail.error() or "the stream ended early"

    async def _read_stream(
        self, content: aiohttp.StreamReader, record: RequestRecord, tail: StreamTail, meter: _Meter
    ) -> None:
        while chunk := await content.readany():
            tail.feed(chunk)
            now = self.now()
            if record.last_token_s is not None:
                record.max_gap_s = max(record.max_gap_s, now - record.last_token_s)
                record.last_token_s = now
            elif tail.has_token():
                record.first_token_s = record.last_token_s = now
                meter.input_tokens += record.input_tokens
            if record.timeline is not None and record.first_token_s is not None:
                record.timeline.append((now, tail.output_tokens()))


def _seconds(header: str | None) -> float | None:
    try:
        return None if header is None else float(header)
    except ValueError:
        return None
