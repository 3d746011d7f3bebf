"""One node, simulated event by event around the production `Admission` and `StepPolicy`."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

from benchmarks.simulator import trace
from benchmarks.simulator.clients import Client, ClosedLoop, Shape, next_arrival
from benchmarks.simulator.composer import SeatComposer
from benchmarks.simulator.engine import KV_BLOCK, Batch, Engine, Rules, Stream
from benchmarks.simulator.machines import QWEN3_8B_H100
from contract.step_time import StepTime
from scheduler import Admission, Ask, Capacity, Policy, Reason, Refusal, SeatTerms, State, Ticket
from scheduler.step_time import StepTimeFit
from scheduler.steps import StepPolicy


@dataclass(frozen=True, slots=True)
class SeatPlan:
    """One seat and its blocks, `(opens_s, closes_s)` each; a block without end has None."""

    terms: SeatTerms
    blocks: tuple[tuple[float, float | None], ...] = ((0.0, None),)


@dataclass(frozen=True, slots=True)
class Change:
    """At `at_s` the engine has another capacity, and its steps take `slowdown` times as long."""

    at_s: float
    capacity: Capacity
    slowdown: float = 1.0


@dataclass(frozen=True, slots=True)
class Scenario:
    """All that a simulation needs, apart from the seed."""

    seats: tuple[SeatPlan, ...]
    clients: tuple[Client, ...]
    capacity: Capacity
    policy: Policy = field(default_factory=Policy)
    step_time: StepTime = QWEN3_8B_H100
    seed_step_time: StepTime | None = None
    """What the step policy takes for the step time until it has learned better; None for the truth."""
    step_tokens: int = 2_048
    """Tokens in one step (`max_num_batched_tokens`)."""
    changes: tuple[Change, ...] = ()


@dataclass(slots=True)
class _Request:
    """One request of a client, with what becomes of each of its prompts."""

    client: _Sender
    asks: list[Ask]
    outputs: list[int]
    left: int = 0
    """Prompts that have not ended."""


@dataclass(slots=True)
class _Live:
    """A prompt that has a ticket."""

    prompt: trace.Prompt
    ticket: Ticket
    request: _Request
    output_tokens: int
    streams: list[int] = field(default_factory=list)
    """Keys of its sequences in the engine that have not finished."""


@dataclass(slots=True)
class _Sender:
    """A client and its own random numbers, so that clients do not disturb each other's draws."""

    plan: Client
    rng: random.Random


class Simulation:
    """Plays a scenario. Same scenario and seed, same trace."""

    def __init__(self, scenario: Scenario, seed: int) -> None:
        self._scenario = scenario
        self._admission = Admission(scenario.capacity, scenario.policy)
        self._steps = StepPolicy(
            StepTimeFit(scenario.seed_step_time or scenario.step_time), step_tokens=scenario.step_tokens
        )
        rules = Rules(scenario.capacity.slots, scenario.capacity.kv_tokens, scenario.step_tokens)
        self._engine = Engine(rules, scenario.step_time, SeatComposer(self._steps))
        self._now = 0.0
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._order = 0
        self._in_flight = 0
        """Steps that are composed and not done."""
        self._busy_until = 0.0
        self._prompts = 0
        self._streams: dict[int, _Live] = {}
        self._last_stream = 0
        self._live: dict[int, _Live] = {}
        """By ticket number."""
        self._trace: list[trace.Event] = []
        self._senders = [
            _Sender(client, random.Random(f"{seed}/{i}")) for i, client in enumerate(scenario.clients)
        ]

    def run(self) -> list[trace.Event]:
        """Play until all clients have left and all their requests have ended."""
        self._tell_capacity(self._scenario.capacity)
        self._write(trace.MachineChanged(0.0, self._scenario.step_time, 1.0))
        self._plan()
        while self._agenda:
            self._now, _, act = heapq.heappop(self._agenda)
            act()
            self._settle()
        self._write(self._ending())
        return self._trace

    # --- the agenda --------------------------------------------------------------------------------

    def _at(self, when: float, act: Callable[[], None]) -> None:
        self._order += 1
        heapq.heappush(self._agenda, (when, self._order, act))

    def _plan(self) -> None:
        for seat in self._scenario.seats:
            for opens_s, closes_s in seat.blocks:
                self._at(opens_s, partial(self._open, seat.terms))
                if closes_s is not None:
                    self._at(closes_s, partial(self._close, seat.terms))
        for change in self._scenario.changes:
            self._at(change.at_s, partial(self._change, change))
        for sender in self._senders:
            arrivals = sender.plan.arrivals
            if isinstance(arrivals, ClosedLoop):
                for _ in range(arrivals.connections):
                    self._at(sender.plan.start_s, partial(self._send, sender))
            else:
                self._next_open_loop(sender, sender.plan.start_s)

    def _next_open_loop(self, sender: _Sender, now: float) -> None:
        plan = sender.plan
        if isinstance(plan.arrivals, ClosedLoop):
            return
        when = now + next_arrival(plan.arrivals, now - plan.start_s, sender.rng)
        if when < plan.end_s:
            self._at(when, partial(self._send_and_plan_next, sender))

    def _send_and_plan_next(self, sender: _Sender) -> None:
        self._send(sender)
        self._next_open_loop(sender, self._now)

    # --- what happens to the node ------------------------------------------------------------------

    def _open(self, terms: SeatTerms) -> None:
        self._admission.open_seat(terms, self._now)
        self._set_seat(terms, terms.guarantee_tok_s)
        self._write(
            trace.SeatOpened(
                self._now,
                terms.seat_id,
                terms.quantity,
                terms.guarantee_tok_s,
                terms.prefill_tok_s,
                terms.rpm_limit,
                terms.tpm_limit,
            )
        )

    def _close(self, terms: SeatTerms) -> None:
        evicted = self._admission.close_seat(terms.seat_id, Reason.OUTSIDE_BLOCK, self._now)
        self._set_seat(terms, 0.0)
        self._write(trace.SeatClosed(self._now, terms.seat_id))
        self._evicted(evicted)

    def _set_seat(self, terms: SeatTerms, guarantee_tok_s: float) -> None:
        self._steps.set_seat(
            terms.seat_id, guarantee_tok_s, terms.prefill_tok_s, terms.quantity, terms.weight
        )

    def _change(self, change: Change) -> None:
        self._admission.capacity = change.capacity
        self._engine.rules = replace(
            self._engine.rules, slots=change.capacity.slots, kv_tokens=change.capacity.kv_tokens
        )
        self._engine.slowdown = change.slowdown
        self._tell_capacity(change.capacity)
        self._write(trace.MachineChanged(self._now, self._scenario.step_time, change.slowdown))

    def _settle(self) -> None:
        """Let the scheduler act, and the engine begin its next step if it stands still."""
        self._evicted(self._admission.expire(self._now))
        self._admission.borrowed_limit = self._steps.borrowed_limit
        # A prefix hit makes room in the KV cache, for which more may enter at once.
        while entering := self._admission.dispatch(self._now):
            for ticket in entering:
                self._enter(ticket)
        self._write(trace.Settled(self._now, self._admission.virtual_time))
        while self._in_flight < self._engine.batches_in_flight and self._compose():
            pass

    def _compose(self) -> bool:
        batch = self._engine.compose(self._now)
        if batch is None:
            return False
        held = tuple(stream.key for stream in self._engine.running if stream.held)
        parts = tuple((piece.stream.key, piece.tokens) for piece in batch.pieces)
        self._write(trace.Composed(self._now, parts, held, batch.preempted))
        self._in_flight += 1
        self._busy_until = max(self._busy_until, self._now) + batch.seconds
        self._at(self._busy_until, partial(self._end_step, batch))
        return True

    def _enter(self, ticket: Ticket) -> None:
        live = self._live[ticket.number]
        prompt = live.prompt
        cached = int(prompt.input_tokens * live.request.client.plan.shape.cached_share)
        live.streams = [self._last_stream + 1 + i for i in range(prompt.count)]
        self._last_stream += prompt.count
        self._write(trace.Entered(self._now, prompt.number, cached, tuple(live.streams)))
        if cached:
            self._admission.record_prefix_hit(ticket, cached)
        leader = None
        for key in live.streams:
            stream = Stream(
                key,
                prompt.input_tokens,
                live.output_tokens,
                seat_id=prompt.seat_id,
                due=ticket.due,
                max_tokens=prompt.max_tokens,
                cached_tokens=cached,
                leader=leader,
            )
            leader = leader or stream
            self._streams[key] = live
            self._engine.add(stream, self._now)

    def _end_step(self, batch: Batch) -> None:
        self._in_flight -= 1
        # Work of prompts whose clients left during the step is lost; all else counts.
        done = self._engine.complete(batch, self._now)
        work: dict[int, tuple[int, int]] = {}
        for part in done:
            number = self._streams[part.key].ticket.number
            prefilled, made = work.get(number, (0, 0))
            work[number] = prefilled + part.prefilled, made + part.made
        self._admission.record_step(
            [(self._live[number].ticket, made) for number, (_, made) in work.items() if made], self._now
        )
        self._write(
            trace.Stepped(
                self._now,
                tuple((self._live[n].prompt.number, *amounts) for n, amounts in work.items()),
                tuple(part.key for part in done if part.finished),
            )
        )
        for part in done:
            if part.finished:
                self._finish_stream(part.key)

    def _finish_stream(self, key: int) -> None:
        live = self._streams.pop(key)
        live.streams.remove(key)
        if not live.streams:
            self._release(live)
            self._write(trace.Finished(self._now, live.prompt.number))
            self._over(live)

    def _evicted(self, tickets: list[Ticket]) -> None:
        for ticket in tickets:
            live = self._live[ticket.number]
            reason = ticket.refusal.reason.value if ticket.refusal is not None else ""
            self._write(trace.Evicted(self._now, live.prompt.number, reason))
            self._over(live)

    def _release(self, live: _Live) -> None:
        """Twice, as a server does whose client leaves while its answer ends."""
        self._admission.release(live.ticket, self._now)
        self._admission.release(live.ticket, self._now)

    # --- what clients do ---------------------------------------------------------------------------

    def _send(self, sender: _Sender) -> None:
        if self._now >= sender.plan.end_s:
            return
        shape, rng = sender.plan.shape, sender.rng
        lengths = [
            (rng.randint(*shape.output_tokens), rng.randint(*shape.input_tokens))
            for _ in range(shape.prompts)
        ]
        # As vLLM does, the door cuts what would not fit into the KV cache alone.
        longest = self._engine.rules.kv_blocks * KV_BLOCK
        asks = [
            Ask(tokens, max(1, min(shape.max_tokens, longest - tokens)), shape.count) for _, tokens in lengths
        ]
        outputs = [min(ask.max_tokens, made) for ask, (made, _) in zip(asks, lengths, strict=True)]
        self._submit(_Request(sender, asks, outputs), retry=False)

    def _submit(self, request: _Request, *, retry: bool) -> None:
        seat_id = request.client.plan.seat_id
        prompts = tuple(self._prompt(seat_id, ask) for ask in request.asks)
        self._write(trace.Submitted(self._now, seat_id, prompts, retry))
        answer = self._admission.submit(seat_id, request.asks, self._now)
        if isinstance(answer, Refusal):
            self._write(trace.Refused(self._now, seat_id, prompts, answer.reason.value, answer.retry_after_s))
            self._refused(request, answer)
            return
        self._write(trace.Queued(self._now, seat_id, prompts))
        request.left = len(prompts)
        for prompt, ticket, output in zip(prompts, answer, request.outputs, strict=True):
            live = self._live[ticket.number] = _Live(prompt, ticket, request, output)
            self._at(ticket.expires_at, _nothing)
            self._maybe_leave(live, request.client)

    def _prompt(self, seat_id: str, ask: Ask) -> trace.Prompt:
        self._prompts += 1
        return trace.Prompt(self._prompts, seat_id, ask.input_tokens, ask.max_tokens, ask.count)

    def _refused(self, request: _Request, refusal: Refusal) -> None:
        plan = request.client.plan
        wait = refusal.retry_after_s
        if plan.retries and wait is not None and self._now + wait < plan.end_s:
            self._at(self._now + wait, partial(self._submit, request, retry=True))
        elif isinstance(plan.arrivals, ClosedLoop):
            self._at(self._now + (wait or 0.5), partial(self._send, request.client))

    def _maybe_leave(self, live: _Live, sender: _Sender) -> None:
        shape: Shape = sender.plan.shape
        if shape.cancel_share and sender.rng.random() < shape.cancel_share:
            self._at(self._now + sender.rng.random() * shape.patience_s, partial(self._leave, live))

    def _leave(self, live: _Live) -> None:
        if live.ticket.number not in self._live:
            return
        queued = live.ticket.state is State.QUEUED
        self._release(live)
        for key in live.streams:
            self._engine.remove(key, self._now)
            del self._streams[key]
        gone = trace.Canceled if queued else trace.Finished
        self._write(gone(self._now, live.prompt.number))
        self._over(live)

    def _over(self, live: _Live) -> None:
        del self._live[live.ticket.number]
        live.request.left -= 1
        sender = live.request.client
        arrivals = sender.plan.arrivals
        if live.request.left == 0 and isinstance(arrivals, ClosedLoop):
            self._at(self._now + arrivals.think_s, partial(self._send, sender))

    # --- the trace ---------------------------------------------------------------------------------

    def _tell_capacity(self, capacity: Capacity) -> None:
        step_tokens = self._scenario.step_tokens
        self._write(trace.CapacityChanged(self._now, capacity.slots, capacity.kv_tokens, step_tokens))

    def _write(self, event: trace.Event) -> None:
        self._trace.append(event)

    def _ending(self) -> trace.Ended:
        admission = self._admission
        seats = []
        for seat_id in admission.seat_ids():
            reading = admission.read(seat_id, self._now)
            seats.append(
                trace.SeatTotals(
                    seat_id,
                    tuple(reading.requests.items()),
                    reading.queued,
                    reading.in_flight,
                    reading.owed_tokens,
                    reading.output_tokens,
                )
            )
        return trace.Ended(self._now, admission.queued(), admission.in_flight, tuple(seats))


def _nothing() -> None:
    """Wake the scheduler, as a timer does when the oldest queued request expires."""
