"""Any sequence of calls keeps the promises: `Admission` beside a reference model that shares no code.

The model is slow and plain: it keeps every prompt in a list, integrates the ledger from the list at
every reading, and decides for itself which limits a request meets.
"""

import copy
import math
from dataclasses import dataclass, field
from itertools import pairwise

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from scheduler import Admission, Ask, Capacity, Policy, Reason, Refusal, SeatTerms, State, Ticket
from scheduler.step_rules import UNLIMITED

SEATS = ("a", "b", "c")
SLOTS = 6
KV = 2_000
POLICY = Policy(initial_output_tokens=20.0, max_queued_per_seat=6, queue_timeout_s=10.0)

asks = st.builds(
    Ask,
    input_tokens=st.integers(0, 300),
    max_tokens=st.integers(1, 60),
    count=st.sampled_from((1, 1, 1, 2, 3, 4)),
)
all_terms = st.builds(
    SeatTerms,
    seat_id=st.sampled_from(SEATS),
    quantity=st.integers(1, 2),
    guarantee_tok_s=st.sampled_from((0.0, 50.0)),
    prefill_tok_s=st.sampled_from((100.0, 1_000.0)),
    rpm_limit=st.sampled_from((6, 60, 1_000_000)),
    tpm_limit=st.sampled_from((200, 2_000, 10_000_000)),
)


@dataclass
class Prompt:
    """One ticket as the model knows it."""

    ticket: Ticket
    seat_id: str
    ask: Ask
    submitted_at: float
    due: float
    reserved: float
    state: str = "queued"
    ended_at: float | None = None
    first_token_at: float | None = None
    produced: int = 0
    kv: int = 0
    cached: int = 0
    entered_owed: bool = False


@dataclass
class Model:
    """One seat as the model knows it."""

    terms: SeatTerms
    open: bool = True
    requests: float = 0.0
    tokens: float = 0.0
    at: float = 0.0
    expected: float = POLICY.initial_output_tokens
    rates: list[tuple[float, float, int]] = field(default_factory=list)
    """Guarantee and quantity from each moment on."""
    delivered: int = 0
    read_by: float = 0.0
    """When its prompts so far are read, at the rate of all its seats."""

    def refill(self, now: float) -> None:
        gone = (now - self.at) / 60
        self.requests = min(self.terms.rpm_limit, self.requests + gone * self.terms.rpm_limit)
        self.tokens = min(self.terms.tpm_limit, self.tokens + gone * self.terms.tpm_limit)
        self.at = now

    def output(self, ask: Ask) -> int:
        return ask.count * min(math.ceil(self.expected), ask.max_tokens)


class AdmissionMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.admission = Admission(Capacity(SLOTS, KV), POLICY)
        self.now = 0.0
        self.models: dict[str, Model] = {}
        self.prompts: list[Prompt] = []
        self.virtual_time = 0.0
        self.drained = False
        self.rejected = dict.fromkeys(SEATS, 0)

    # --- what may happen ---------------------------------------------------------------------------

    @initialize(terms=all_terms)
    def start(self, terms: SeatTerms) -> None:
        self.open_or_change(terms)

    @rule(terms=all_terms)
    def open_or_change(self, terms: SeatTerms) -> None:
        self.admission.open_seat(terms, self.now)
        model = self.models.get(terms.seat_id)
        if model is None:
            model = Model(terms, requests=terms.rpm_limit, tokens=terms.tpm_limit, at=self.now)
            self.models[terms.seat_id] = model
        model.refill(self.now)
        model.requests += terms.rpm_limit - model.terms.rpm_limit
        model.tokens += terms.tpm_limit - model.terms.tpm_limit
        model.terms, model.open = terms, True
        model.rates.append((self.now, terms.guarantee_tok_s, terms.quantity))

    @rule(seat_id=st.sampled_from(SEATS))
    def close(self, seat_id: str) -> None:
        if seat_id not in self.models:
            return
        model = self.models[seat_id]
        evicted = self.admission.close_seat(seat_id, Reason.OUTSIDE_BLOCK, self.now)
        assert [p.ticket for p in self.queue(seat_id)] == evicted
        model.open = False
        model.rates.append((self.now, 0.0, model.terms.quantity))
        self.evict(evicted, Reason.OUTSIDE_BLOCK)

    @rule(seat_id=st.sampled_from(SEATS), group=st.lists(asks, min_size=1, max_size=3))
    def submit(self, seat_id: str, group: list[Ask]) -> None:
        if seat_id not in self.models:
            return
        true_reasons = self.reasons(seat_id, group)
        before = copy.deepcopy(self.admission)
        answer = self.admission.submit(seat_id, group, self.now)
        if isinstance(answer, Refusal):
            assert answer.reason in true_reasons
            self.rejected[seat_id] += sum(ask.count for ask in group)
            self.check_retry(before, seat_id, group, answer, true_reasons)
            return
        assert not true_reasons, f"admitted although {true_reasons}"
        assert len(answer) == len(group)
        self.accept(seat_id, group, answer)

    @rule()
    def dispatch(self) -> None:
        for ticket in self.admission.dispatch(self.now):
            prompt = self.of(ticket)
            queue = self.queue(prompt.seat_id)
            assert queue[0] is prompt, "first come, first served within a seat"
            self.check_room(prompt)
            prompt.entered_owed = prompt.ask.count <= self.unused(prompt.seat_id)
            prompt.kv = prompt.ask.input_tokens + self.models[prompt.seat_id].output(prompt.ask)
            prompt.state = "running"
        self.check_nothing_waits_needlessly()

    @rule(limit=st.sampled_from((0, 1, 3, UNLIMITED)))
    def limit_borrowed_work(self, limit: int) -> None:
        self.admission.borrowed_limit = limit

    @precondition(lambda self: self.running())
    @rule(tokens=st.lists(st.integers(0, 40), min_size=1, max_size=6))
    def step(self, tokens: list[int]) -> None:
        produced = []
        for prompt, made in zip(self.running(), tokens, strict=False):
            if made:
                produced.append((prompt.ticket, made))
                prompt.produced += made
                self.models[prompt.seat_id].delivered += made
                if prompt.first_token_at is None:
                    prompt.first_token_at = self.now
        self.admission.record_step(produced, self.now)

    @precondition(lambda self: self.running())
    @rule(share=st.floats(0, 1), which=st.integers(0, 5))
    def prefix_hit(self, share: float, which: int) -> None:
        running = self.running()
        prompt = running[which % len(running)]
        cached = int(share * prompt.ask.input_tokens)
        self.admission.record_prefix_hit(prompt.ticket, cached)
        if cached > prompt.cached:
            prompt.kv -= cached - prompt.cached
            prompt.cached = cached

    @precondition(lambda self: self.prompts)
    @rule(which=st.integers(0, 100), times=st.integers(1, 3))
    def release(self, which: int, times: int) -> None:
        """Of any ticket, ended ones too, and more than once."""
        self.let_go(self.prompts[which % len(self.prompts)], times)

    @rule()
    def expire(self) -> None:
        overdue = [p for p in self.prompts if p.state == "queued" and p.submitted_at + 10.0 <= self.now]
        evicted = self.admission.expire(self.now)
        assert {p.ticket.number for p in overdue} == {ticket.number for ticket in evicted}
        self.evict(evicted, Reason.QUEUE_TIMEOUT)

    @rule(seconds=st.floats(0.001, 20.0))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @precondition(lambda self: len(self.prompts) > 20)
    @rule()
    def drain(self) -> None:
        self.drained = True
        self.evict(self.admission.drain(self.now), Reason.DRAINING)

    # --- what must hold ------------------------------------------------------------------------------

    @invariant()
    def counts_agree(self) -> None:
        assert self.admission.in_flight == sum(p.ask.count for p in self.running())
        assert self.admission.queued() == sum(p.state == "queued" for p in self.prompts)
        for seat_id, model in self.models.items():
            reading = self.admission.read(seat_id, self.now)
            mine = [p for p in self.prompts if p.seat_id == seat_id]
            assert reading.queued == len(self.queue(seat_id))
            assert reading.in_flight == sum(p.ask.count for p in mine if p.state == "running")
            assert reading.output_tokens == model.delivered
            assert math.isfinite(reading.virtual_time)
            assert reading.requests == {
                "dispatched": sum(p.ask.count for p in mine if p.state in ("running", "finished")),
                "rejected": self.rejected[seat_id],
                "evicted": sum(p.ask.count for p in mine if p.state == "evicted"),
                "canceled": sum(p.ask.count for p in mine if p.state == "canceled"),
            }

    @invariant()
    def states_agree(self) -> None:
        for prompt in self.prompts:
            assert prompt.ticket.state is State(prompt.state)

    @invariant()
    def virtual_time_never_decreases(self) -> None:
        assert self.admission.virtual_time >= self.virtual_time
        self.virtual_time = self.admission.virtual_time

    @invariant()
    def limits_agree(self) -> None:
        for seat_id, model in self.models.items():
            model.refill(self.now)
            requests, tokens = self.admission.read_limits(seat_id, self.now)
            assert abs(requests.remaining - max(0.0, model.requests)) <= 1 + 1e-6
            assert abs(tokens.remaining - max(0.0, model.tokens)) <= 1 + 1e-6 * model.terms.tpm_limit
            assert min(requests.remaining, tokens.remaining) >= 0

    @invariant()
    def ledger_agrees_with_slow_integration(self) -> None:
        for seat_id in self.models:
            owed = self.admission.read(seat_id, self.now).owed_tokens
            assert math.isclose(owed, self.slow_owed(seat_id), rel_tol=1e-9, abs_tol=1e-6)

    def teardown(self) -> None:
        for prompt in list(self.prompts):
            self.let_go(prompt, 1)
        assert self.admission.in_flight == 0
        assert self.admission.queued() == 0
        assert self.admission._kv_in_use == 0
        for seat_id in self.models:
            self.admission.close_seat(seat_id, Reason.REVOKED, self.now)
        assert self.admission._owed_in_flight == 0
        assert self.admission._owed_kv_in_use == 0
        assert all(self.admission.forget_seat(seat_id) for seat_id in self.models)

    # --- the model -----------------------------------------------------------------------------------

    def of(self, ticket: Ticket) -> Prompt:
        return next(p for p in self.prompts if p.ticket is ticket)

    def of_seat(self, seat_id: str) -> list[Prompt]:
        return [p for p in self.prompts if p.seat_id == seat_id]

    def queue(self, seat_id: str) -> list[Prompt]:
        return [p for p in self.prompts if p.seat_id == seat_id and p.state == "queued"]

    def running(self) -> list[Prompt]:
        return [p for p in self.prompts if p.state == "running"]

    def seats(self, seat_id: str) -> int:
        """How many sequences the seat is owed at a time."""
        model = self.models[seat_id]
        return model.terms.quantity if model.open and model.terms.guarantee_tok_s > 0 else 0

    def used(self, seat_id: str) -> int:
        return sum(p.ask.count for p in self.running() if p.seat_id == seat_id)

    def unused(self, seat_id: str) -> int:
        return max(0, self.seats(seat_id) - self.used(seat_id))

    def fits(self, prompt: Prompt) -> bool:
        """Whether there is room for it, by the rules for owed or for borrowed work."""
        running = self.running()
        if not running:
            return True
        need = prompt.ask.input_tokens + self.models[prompt.seat_id].output(prompt.ask)
        owed = sum(min(self.seats(seat_id), self.used(seat_id)) for seat_id in self.models)
        if prompt.ask.count <= self.unused(prompt.seat_id):
            owed_kv = sum(p.kv for p in running if p.entered_owed and self.seats(p.seat_id))
            return owed + prompt.ask.count <= SLOTS and owed_kv + need <= KV
        borrowed = sum(p.ask.count for p in running) - owed
        if borrowed > 0 and borrowed + prompt.ask.count > self.admission.borrowed_limit:
            return False
        return owed + borrowed + prompt.ask.count <= SLOTS and sum(p.kv for p in running) + need <= KV

    def check_room(self, prompt: Prompt) -> None:
        assert self.fits(prompt), f"{prompt.ticket} entered without room"

    def check_nothing_waits_needlessly(self) -> None:
        heads = [self.queue(seat_id)[0] for seat_id in self.models if self.queue(seat_id)]
        owed = [p for p in heads if p.ask.count <= self.unused(p.seat_id)]
        for waiting in (owed, heads):
            assert not waiting or not all(self.fits(p) for p in waiting), "room, and yet they wait"

    def reasons(self, seat_id: str, group: list[Ask]) -> set[Reason]:
        """All true reasons to refuse."""
        model = self.models[seat_id]
        model.refill(self.now)
        terms = model.terms
        count = sum(ask.count for ask in group)
        bound = 6 * terms.quantity
        waiting = sum(p.ask.count for p in self.queue(seat_id))
        reserve = min(terms.tpm_limit, sum(ask.input_tokens + model.output(ask) for ask in group))
        holds = {
            Reason.DRAINING: self.drained,
            Reason.OUTSIDE_BLOCK: not model.open,
            Reason.TOO_WIDE: max(ask.count for ask in group) > SLOTS,
            Reason.TOO_MANY: count > terms.rpm_limit,
            Reason.OVER_QUEUE: count > bound,
            Reason.TOO_LARGE: sum(ask.input_tokens + ask.count for ask in group) > terms.tpm_limit,
            Reason.REQUEST_LIMIT: model.requests < count - 1e-7 * terms.rpm_limit,
            Reason.TOKEN_LIMIT: model.tokens < reserve - 1e-7 * terms.tpm_limit,
            Reason.QUEUE_FULL: waiting + count > bound,
        }
        return {reason for reason, true in holds.items() if true}

    def check_retry(
        self,
        before: Admission,
        seat_id: str,
        group: list[Ask],
        refusal: Refusal,
        true_reasons: set[Reason],
    ) -> None:
        """On time is admitted, and a refused request left no trace."""
        if not true_reasons <= {Reason.REQUEST_LIMIT, Reason.TOKEN_LIMIT}:
            return
        assert refusal.retry_after_s is not None
        retry_at = self.now + refusal.retry_after_s
        for node in (before, copy.deepcopy(self.admission)):
            assert not isinstance(node.submit(seat_id, group, retry_at), Refusal)

    def accept(self, seat_id: str, group: list[Ask], tickets: list[Ticket]) -> None:
        model = self.models[seat_id]
        left = float(model.terms.tpm_limit)
        for ask, ticket in zip(group, tickets, strict=True):
            reserved = min(left, ask.input_tokens + model.output(ask))
            left -= reserved
            model.requests -= ask.count
            model.tokens -= reserved
            # With `n` sequences it has to wait for as many seats: owed from its first token on only.
            grace = 1.0 if ask.count == 1 else math.inf
            reading_s = ask.input_tokens / model.terms.prefill_tok_s
            if all(p.ended_at is not None or p.first_token_at is not None for p in self.of_seat(seat_id)):
                model.read_by = 0.0
            model.read_by = max(model.read_by, self.now) + reading_s / model.terms.quantity
            due = max(model.read_by, self.now + reading_s) + grace
            self.prompts.append(Prompt(ticket, seat_id, ask, self.now, due, reserved))

    def evict(self, tickets: list[Ticket], reason: Reason) -> None:
        for ticket in tickets:
            prompt = self.of(ticket)
            assert prompt.state == "queued"
            assert ticket.refusal is not None
            assert ticket.refusal.reason is reason
            self.end(prompt, "evicted", requests=prompt.ask.count, tokens=prompt.reserved)

    def let_go(self, prompt: Prompt, times: int) -> None:
        for _ in range(times):
            self.admission.release(prompt.ticket, self.now)
        if prompt.state == "queued":
            self.end(prompt, "canceled", requests=0, tokens=prompt.reserved)
        elif prompt.state == "running":
            used = prompt.ask.input_tokens + prompt.produced
            self.end(prompt, "finished", requests=0, tokens=prompt.reserved - used)
            model = self.models[prompt.seat_id]
            model.expected += 0.1 * (prompt.produced / prompt.ask.count - model.expected)

    def end(self, prompt: Prompt, state: str, *, requests: float, tokens: float) -> None:
        prompt.state, prompt.ended_at = state, self.now
        model = self.models[prompt.seat_id]
        model.refill(self.now)
        model.requests = min(model.terms.rpm_limit, model.requests + requests)
        model.tokens = min(model.terms.tpm_limit, model.tokens + tokens)

    def slow_owed(self, seat_id: str) -> float:
        """Owed tokens since the beginning, from moment to moment at which anything changed."""
        spans = []
        for p in self.prompts:
            if p.seat_id == seat_id:
                start = p.due if p.first_token_at is None else min(p.due, p.first_token_at)
                spans.append((start, self.now if p.ended_at is None else p.ended_at, p.ask.count))
        rates = self.models[seat_id].rates
        moments = {at for start, end, _ in spans for at in (start, end)} | {at for at, _, _ in rates}
        moments = {at for at in moments if at < self.now} | {self.now}
        total = 0.0
        for since, until in pairwise(sorted(moments)):
            owing = sum(count for start, end, count in spans if start <= since and end >= until)
            current = [(g, q) for at, g, q in rates if at <= since]
            if current:
                guarantee, quantity = current[-1]
                total += guarantee * min(owing, quantity) * (until - since)
        return total


AdmissionMachine.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=50,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestAdmission = AdmissionMachine.TestCase
