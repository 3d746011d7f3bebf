"""The node as a trace shows it: the oracles' own bookkeeping."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from benchmarks.simulator import trace
from contract.step_time import StepTime

EPSILON = 1e-6
KV_BLOCK = 16
EASY = 0.6
"""A step that takes less than this share of the pace endangers nobody."""


@dataclass(frozen=True, slots=True)
class Promised:
    """The constants the promises name; as in the scheduling contract, not as in the code under test."""

    input_weight: float = 1.0
    output_weight: float = 2.0
    first_token_grace_s: float = 1.0
    queue_timeout_s: float = 60.0
    max_queued_per_seat: int = 256
    initial_output_tokens: float = 256.0
    output_mean_smoothing: float = 0.1
    foreseen_share: float = 0.25
    ahead_s: float = 0.03
    ends_memory_s: float = 1.0
    spare_from_per_s: float = 0.3
    owed_memory_s: float = 4.0
    elastic_share: float = 0.0625


@dataclass(slots=True)
class Bucket:
    """A limit per minute, refilled continuously."""

    limit: int
    level: float
    at: float

    def add(self, units: float, now: float) -> None:
        refilled = min(float(self.limit), self.level + (now - self.at) * self.limit / 60.0)
        self.level = min(float(self.limit), refilled + units)
        self.at = now


@dataclass(slots=True)
class Recent:
    """Sequences a second of late: each counts for 1/memory at first, and is forgotten exponentially."""

    memory_s: float
    level: float = 0.0
    at: float = 0.0

    def add(self, sequences: int, now: float) -> None:
        self.level = self.per_s(now) + sequences / self.memory_s
        self.at = now

    def per_s(self, now: float) -> float:
        return self.level * math.exp((self.at - now) / self.memory_s)


@dataclass(slots=True)
class SeatView:
    """A seat as seen from outside."""

    terms: trace.SeatOpened
    requests: Bucket
    tokens: Bucket
    open: bool = True
    numbers: list[int] = field(default_factory=list)
    """Of all its prompts that were queued."""
    queue: list[int] = field(default_factory=list)
    waiting: int = 0
    running: int = 0
    """Sequences in the engine."""
    tickets: int = 0
    """Prompts in the engine."""
    expected: float = 0.0
    read_by: float = 0.0
    """When its prompts so far are read, at its seats' rate."""
    unread: int = 0
    """Prompts that wait for a first token."""
    service: float = 0.0
    """Cost of what the engine did for it."""
    largest_cost: float = 0.0
    most_tickets: int = 0
    owed_entries: float = 0.0
    """Cost of the prompts that entered under the guarantee."""
    changes: int = 0
    """Counts all that may change whether a retry is admitted."""

    @property
    def quota(self) -> int:
        """Sequences that are owed a pace at a time."""
        return self.terms.quantity if self.open and self.terms.guarantee_tok_s > 0 else 0

    @property
    def unused(self) -> int:
        return max(0, self.quota - self.running)

    @property
    def owed(self) -> int:
        """Sequences in the engine that count as owed."""
        return min(self.quota, self.running)


@dataclass(slots=True)
class PromptView:
    """A prompt as seen from outside."""

    prompt: trace.Prompt
    submitted_at: float
    due: float = math.inf
    """When its first token is; never for one of several sequences, which waits for as many seats."""
    reserved: float = 0.0
    kv_tokens: int = 0
    owed_kv_tokens: int = 0
    upfront: float = 0.0
    cost: float = 0.0
    """Cost of what the engine did for it so far."""
    produced: int = 0
    first_token_at: float | None = None
    entered: bool = False
    owed: bool = False
    streams: tuple[int, ...] = ()
    outcomes: list[str] = field(default_factory=list)
    ended_at: float | None = None


@dataclass(slots=True)
class StreamView:
    """A sequence in the engine as seen from outside."""

    key: int
    number: int
    seat_id: str
    prefill_left: int
    """Tokens to compute before it decodes."""
    input_tokens: int
    composed: int = 0
    """Output tokens of all steps composed so far."""
    kv_tokens: int = 0
    running: bool = False

    @property
    def decoding(self) -> bool:
        return self.prefill_left == 0

    def compute(self, tokens: int) -> None:
        self.running = True
        self.kv_tokens += tokens
        if self.prefill_left > tokens:
            self.prefill_left -= tokens
        else:
            self.prefill_left = 0
            self.composed += 1

    def preempt(self) -> None:
        self.running = False
        self.kv_tokens = 0
        self.prefill_left = self.input_tokens + self.composed


class View:
    """The node as the trace shows it."""

    def __init__(self, promised: Promised) -> None:
        self.promised = promised
        self.slots = 0
        self.kv_tokens = 0
        self.step_tokens = 0
        self.in_flight = 0
        self.kv_in_use = 0
        self.owed_kv_in_use = 0
        """Of prompts that entered as owed work, in blocks that are still open."""
        self.virtual_time = 0.0
        self.ended = Recent(promised.ends_memory_s)
        self.owed_entered = Recent(promised.owed_memory_s)
        self.seats: dict[str, SeatView] = {}
        self.prompts: dict[int, PromptView] = {}
        self.streams: dict[int, StreamView] = {}
        """In the engine, in order of entry."""
        self.held: tuple[int, ...] = ()
        """Streams left out of the step composed last."""
        self.step_time: StepTime | None = None
        self.slowdown = 1.0

    # --- what an oracle asks -----------------------------------------------------------------------

    @property
    def owed_in_flight(self) -> int:
        """Sequences in the engine that are within their seats' quantities."""
        return sum(seat.owed for seat in self.seats.values())

    def expected_output(self, prompt: trace.Prompt) -> int:
        seat = self.seats[prompt.seat_id]
        return prompt.count * min(math.ceil(seat.expected - EPSILON), prompt.max_tokens)

    def need(self, prompt: trace.Prompt) -> int:
        """KV tokens that the prompt takes, as expected."""
        return prompt.input_tokens + self.expected_output(prompt)

    def reservation(self, prompts: Iterable[trace.Prompt], limit: int) -> int:
        return min(limit, sum(self.need(prompt) for prompt in prompts))

    def fits(self, prompt: trace.Prompt, *, owed: bool, beyond: int = 0) -> bool:
        """Whether there is room: for owed work all that owed work does not use; for borrowed work, with
        `beyond` more sequences than slots."""
        slots, kv = self.in_flight - beyond, self.kv_in_use
        if owed:
            slots, kv = self.owed_in_flight, self.owed_kv_in_use
        return slots + prompt.count <= self.slots and kv + self.need(prompt) <= self.kv_tokens

    def elastic(self, now: float) -> int:
        """By how many sequences borrowed work goes beyond the slots; negative while it leaves some to owed
        requests that keep coming."""
        most = math.floor(self.slots * self.promised.elastic_share)
        owed, ends = self.owed_entered.per_s(now), self.ended.per_s(now)
        if owed > self.promised.spare_from_per_s:
            return -min(most, math.ceil(2 * owed / max(owed, ends)))
        return min(most, math.ceil(self.promised.ahead_s * ends))

    def owed_streams(self) -> set[int]:
        """Of each guaranteed seat as many sequences as it has seats: the oldest, those that decode first."""
        owed: set[int] = set()
        room = {seat_id: seat.quota for seat_id, seat in self.seats.items() if seat.quota}
        guaranteed = [(key, stream) for key, stream in self.streams.items() if stream.seat_id in room]
        for decoding in (True, False):
            for key, stream in guaranteed:
                if room[stream.seat_id] > 0 and stream.decoding is decoding:
                    room[stream.seat_id] -= 1
                    owed.add(key)
        return owed

    def pace_s(self) -> float | None:
        """The longest step with which the owed sequences in the engine keep their pace."""
        rates = [self.seats[self.streams[key].seat_id].terms.guarantee_tok_s for key in self.owed_streams()]
        return 1 / max(rates) if rates else None

    def full_step_s(self, more: Iterable[trace.Prompt] = ()) -> float:
        """Seconds of a step with everything in it that is in the engine, and all of `more` besides."""
        assert self.step_time is not None
        prefill = sum(stream.prefill_left for stream in self.streams.values())
        kv_tokens = sum(stream.kv_tokens for stream in self.streams.values() if stream.decoding)
        decodes = len(self.streams)
        for prompt in more:
            prefill += prompt.input_tokens
            decodes += prompt.count
        return self.step_time.seconds(prefill, decodes, kv_tokens) * self.slowdown

    def heads(self) -> Iterator[tuple[SeatView, trace.Prompt]]:
        for seat in self.seats.values():
            if seat.queue:
                yield seat, self.prompts[seat.queue[0]].prompt

    # --- how it follows the trace --------------------------------------------------------------------

    def follow(self, event: trace.Event) -> None:
        match event:
            case trace.Stepped():
                self._step(event)
            case trace.Settled():
                self.virtual_time = event.virtual_time
            case trace.Composed():
                self._compose(event)
            case trace.Queued():
                self._queue(event)
            case trace.Refused():
                for prompt in event.prompts:
                    view = self.prompts[prompt.number] = PromptView(prompt, event.at)
                    view.outcomes.append("rejected")
            case trace.Entered():
                self._enter(event)
            case trace.Finished():
                self._finish(self.prompts[event.number], event.at)
            case trace.Canceled() | trace.Evicted():
                self._leave_queue(event)
            case trace.SeatOpened():
                self._open(event)
            case _:
                self._change(event)

    def _change(self, event: trace.Event) -> None:
        match event:
            case trace.SeatClosed():
                seat = self.seats[event.seat_id]
                seat.open = False
                seat.changes += 1
                self._settle_owed_kv(seat)
            case trace.CapacityChanged():
                self.slots, self.kv_tokens = event.slots, event.kv_tokens
                self.step_tokens = event.step_tokens
            case trace.MachineChanged():
                self.step_time, self.slowdown = event.step_time, event.slowdown

    def _open(self, event: trace.SeatOpened) -> None:
        seat = self.seats.get(event.seat_id)
        if seat is None:
            requests = Bucket(event.rpm_limit, float(event.rpm_limit), event.at)
            tokens = Bucket(event.tpm_limit, float(event.tpm_limit), event.at)
            seat = self.seats[event.seat_id] = SeatView(event, requests, tokens)
            seat.expected = self.promised.initial_output_tokens
        seat.open = True
        seat.changes += 1
        self._settle_owed_kv(seat)

    def _settle_owed_kv(self, seat: SeatView) -> None:
        """What entered as owed work is owed while the block is open."""
        for view in [self.prompts[number] for number in seat.numbers]:
            if view.entered and view.owed and view.ended_at is None:
                self.owed_kv_in_use -= view.owed_kv_tokens
                view.owed_kv_tokens = view.kv_tokens if seat.quota else 0
                self.owed_kv_in_use += view.owed_kv_tokens

    def _queue(self, event: trace.Queued) -> None:
        seat = self.seats[event.seat_id]
        left = seat.terms.tpm_limit
        for prompt in event.prompts:
            view = self.prompts[prompt.number] = PromptView(prompt, event.at)
            view.due = self._due(seat, prompt, event.at)
            view.reserved = min(left, self.need(prompt))
            left -= int(view.reserved)
            seat.requests.add(-prompt.count, event.at)
            seat.tokens.add(-view.reserved, event.at)
            seat.queue.append(prompt.number)
            seat.numbers.append(prompt.number)
            seat.waiting += prompt.count
        seat.changes += 1

    def _due(self, seat: SeatView, prompt: trace.Prompt, now: float) -> float:
        reading_s = prompt.input_tokens / seat.terms.prefill_tok_s
        start = max(seat.read_by, now) if seat.unread else now
        seat.read_by = start + reading_s / seat.terms.quantity
        seat.unread += 1
        if prompt.count > 1:
            return math.inf
        return max(seat.read_by, now + reading_s) + self.promised.first_token_grace_s

    def _enter(self, event: trace.Entered) -> None:
        view = self.prompts[event.number]
        prompt, seat = view.prompt, self.seats[view.prompt.seat_id]
        view.outcomes.append("dispatched")
        view.entered = True
        view.owed = prompt.count <= seat.unused
        expected = self.expected_output(prompt)
        foreseen = round(expected * self.promised.foreseen_share)
        view.upfront = (
            prompt.input_tokens * self.promised.input_weight + foreseen * self.promised.output_weight
        )
        view.kv_tokens = prompt.input_tokens + expected - event.cached_tokens
        view.owed_kv_tokens = view.kv_tokens if view.owed else 0
        self.kv_in_use += view.kv_tokens
        self.owed_kv_in_use += view.owed_kv_tokens
        if view.owed:
            self.owed_entered.add(prompt.count, event.at)
        seat.queue.remove(event.number)
        seat.waiting -= prompt.count
        seat.running += prompt.count
        seat.tickets += 1
        seat.most_tickets = max(seat.most_tickets, seat.tickets)
        seat.largest_cost = max(seat.largest_cost, view.upfront)
        seat.changes += 1
        self.in_flight += prompt.count
        view.streams = event.streams
        for place, key in enumerate(event.streams):
            # The second and further sequences find the whole KV blocks of the prompt in the cache.
            cached = (prompt.input_tokens - 1) // KV_BLOCK * KV_BLOCK if place else event.cached_tokens
            left = prompt.input_tokens - min(cached, prompt.input_tokens - 1)
            self.streams[key] = StreamView(key, event.number, prompt.seat_id, left, prompt.input_tokens)

    def _step(self, event: trace.Stepped) -> None:
        for number, prefill, made in event.work:
            view = self.prompts[number]
            seat = self.seats[view.prompt.seat_id]
            cost = prefill * self.promised.input_weight + made * self.promised.output_weight
            view.cost += cost
            view.produced += made
            seat.service += cost
            if made and view.first_token_at is None:
                view.first_token_at = event.at
                seat.unread -= view.ended_at is None
            seat.largest_cost = max(seat.largest_cost, view.cost)

        for key in event.ended:
            self.streams.pop(key, None)

    def _compose(self, event: trace.Composed) -> None:
        for key in event.preempted:
            if key in self.streams:
                self.streams[key].preempt()
        for key, tokens in event.parts:
            self.streams[key].compute(tokens)
        self.held = event.held

    def _finish(self, view: PromptView, at: float) -> None:
        seat = self.seats[view.prompt.seat_id]
        view.ended_at = at
        seat.unread -= view.first_token_at is None
        for key in view.streams:
            self.streams.pop(key, None)
        self.kv_in_use -= view.kv_tokens
        self.owed_kv_in_use -= view.owed_kv_tokens
        self.in_flight -= view.prompt.count
        self.ended.add(view.prompt.count, at)
        seat.running -= view.prompt.count
        seat.tickets -= 1
        seat.tokens.add(view.reserved - view.prompt.input_tokens - view.produced, at)
        mean = view.produced / view.prompt.count
        seat.expected += self.promised.output_mean_smoothing * (mean - seat.expected)
        seat.changes += 1
        if view.owed:
            seat.owed_entries += max(view.cost, view.upfront)

    def _leave_queue(self, event: trace.Canceled | trace.Evicted) -> None:
        view = self.prompts[event.number]
        seat = self.seats[view.prompt.seat_id]
        view.ended_at = event.at
        seat.unread -= 1
        view.outcomes.append("evicted" if isinstance(event, trace.Evicted) else "canceled")
        seat.queue.remove(event.number)
        seat.waiting -= view.prompt.count
        seat.tokens.add(view.reserved, event.at)
        if isinstance(event, trace.Evicted):
            seat.requests.add(view.prompt.count, event.at)
        seat.changes += 1
