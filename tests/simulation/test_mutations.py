"""Break one promise in the scheduler or the step policy on purpose, and see that the evidence tells.

Each mutation patches the running class, no source. `caught_by` names the oracles of which one must
speak: a mutation that some other oracle notices by accident is not enough.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import pytest

from benchmarks.simulator.adversaries import random_scenario
from scheduler import (
    Admission,
    Ask,
    Capacity,
    Outcome,
    Policy,
    Reason,
    Refusal,
    SeatTerms,
    State,
    Ticket,
)
from scheduler.buckets import TokenBucket
from scheduler.ledger import Ledger
from scheduler.limits import Limits
from scheduler.paces import Paces
from scheduler.prompts import Prompts
from scheduler.seats import Seat, SeatHeap
from scheduler.step_rules import UNLIMITED
from scheduler.step_time import StepTimeFit
from scheduler.steps import Plan, StepPolicy
from scheduler.streams import StepSeat, Stream
from tests.simulation import evidence

pytestmark = pytest.mark.slow

SEEDS = range(100)
Patch = pytest.MonkeyPatch


def no_lift(patch: Patch) -> None:
    patch.setattr(Admission, "_rejoin", lambda self, seat: None)


def weight_ignored(patch: Patch) -> None:
    patch.setattr(SeatTerms, "weight", property(lambda self: 1.0))


def output_free(patch: Patch) -> None:
    patch.setattr(Admission, "_charge_output", lambda self, ticket, output_tokens: None)


def input_free(patch: Patch) -> None:
    init = Admission.__init__

    def mutant(self: Admission, capacity: Capacity, policy: Policy | None = None) -> None:
        init(self, capacity, replace(policy or Policy(), input_weight=0.0))

    patch.setattr(Admission, "__init__", mutant)


def output_never_corrected(patch: Patch) -> None:
    charge = Admission._charge_output

    def mutant(self: Admission, ticket: Ticket, output_tokens: int) -> None:
        if ticket.charged_output == 0:
            charge(self, ticket, min(output_tokens, ticket.expected_output))

    patch.setattr(Admission, "_charge_output", mutant)
    patch.setattr(Seat, "expected", lambda self, sequences, max_tokens: sequences)


def no_refund(patch: Patch) -> None:
    charge = Admission._charge

    def mutant(ticket: Ticket, cost: float) -> None:
        if cost > 0:
            charge(ticket, cost)

    patch.setattr(Admission, "_charge", staticmethod(mutant))


def prefix_hits_not_refunded(patch: Patch) -> None:
    patch.setattr(Admission, "record_prefix_hit", lambda self, ticket, cached_tokens: None)


def charge_shrinks_with_the_queue(patch: Patch) -> None:
    charge = Admission._charge

    def mutant(ticket: Ticket, cost: float) -> None:
        charge(ticket, cost / (1 + len(ticket.seat.queue)))

    patch.setattr(Admission, "_charge", staticmethod(mutant))


def largest_tag_first(patch: Patch) -> None:
    init = Admission.__init__

    def mutant(self: Admission, capacity: Capacity, policy: Policy | None = None) -> None:
        init(self, capacity, policy)
        self._fair = SeatHeap(lambda seat: -seat.tag, lambda seat: seat.backlogged)

    patch.setattr(Admission, "__init__", mutant)


def virtual_time_falls(patch: Patch) -> None:
    start = Admission._start

    def mutant(self: Admission, ticket: Ticket, now: float, *, owed: bool) -> Ticket:
        self.virtual_time = 0.0
        return start(self, ticket, now, owed=owed)

    patch.setattr(Admission, "_start", mutant)


def last_come_first_served(patch: Patch) -> None:
    patch.setattr(Seat, "head", property(lambda self: next(reversed(self.queue.values()))))


def owed_work_waits_for_free_slots(patch: Patch) -> None:
    fits = Admission._fits
    patch.setattr(Admission, "_fits", lambda self, ticket, now, *, owed: fits(self, ticket, now, owed=False))


def borrowed_work_takes_owed_room(patch: Patch) -> None:
    fits = Admission._fits
    patch.setattr(Admission, "_fits", lambda self, ticket, now, *, owed: fits(self, ticket, now, owed=True))


def prefix_hits_stay_in_the_owed_account(patch: Patch) -> None:
    record = Admission.record_prefix_hit

    def mutant(self: Admission, ticket: Ticket, cached_tokens: int) -> None:
        ticket.owed_kv_tokens, owed = 0, ticket.owed_kv_tokens
        record(self, ticket, cached_tokens)
        ticket.owed_kv_tokens = owed

    patch.setattr(Admission, "record_prefix_hit", mutant)


def block_end_leaves_owed_kv_cache_taken(patch: Patch) -> None:
    close = Admission.close_seat

    def mutant(self: Admission, seat_id: str, reason: Reason, now: float) -> list[Ticket]:
        tickets, self._seats[seat_id].owed_tickets = self._seats[seat_id].owed_tickets, {}
        evicted = close(self, seat_id, reason, now)
        self._seats[seat_id].owed_tickets = tickets
        return evicted

    patch.setattr(Admission, "close_seat", mutant)


def nobody_is_owed(patch: Patch) -> None:
    patch.setattr(Seat, "head_owed", property(lambda self: False))


def kv_cache_ignored(patch: Patch) -> None:
    fits = Admission._fits

    def mutant(self: Admission, ticket: Ticket, now: float, *, owed: bool) -> bool:
        self._kv_in_use = self._owed_kv_in_use = -1_000_000_000
        return fits(self, ticket, now, owed=owed)

    patch.setattr(Admission, "_fits", mutant)


def slots_ignored(patch: Patch) -> None:
    patch.setattr(Admission, "_fits", lambda self, ticket, now, *, owed: True)


def slots_are_left_free_for_nobody(patch: Patch) -> None:
    def mutant(self: Admission, now: float) -> int:
        return self.capacity.slots - int(self.capacity.slots * self.policy.elastic_share)

    patch.setattr(Admission, "_borrowable_slots", mutant)


def borrowed_work_goes_far_ahead(patch: Patch) -> None:
    def mutant(self: Admission, now: float) -> int:
        return self.capacity.slots + int(self.capacity.slots * self.policy.elastic_share)

    patch.setattr(Admission, "_borrowable_slots", mutant)


def no_slot_is_left_to_owed_requests(patch: Patch) -> None:
    patch.setattr(Admission, "_borrowable_slots", lambda self, now: self.capacity.slots)


def one_entry_at_a_time(patch: Patch) -> None:
    dispatch = Admission.dispatch

    def mutant(self: Admission, now: float) -> list[Ticket]:
        return dispatch(self, now) if self.in_flight < self.capacity.slots // 2 else []

    patch.setattr(Admission, "dispatch", mutant)


def released_twice_counts_twice(patch: Patch) -> None:
    release = Admission.release

    def mutant(self: Admission, ticket: Ticket, now: float) -> None:
        if ticket.state is State.FINISHED:
            self._finish(ticket, now)
        release(self, ticket, now)

    patch.setattr(Admission, "release", mutant)


def canceled_lease_leaks(patch: Patch) -> None:
    release = Admission.release

    def mutant(self: Admission, ticket: Ticket, now: float) -> None:
        if ticket.state is State.QUEUED or ticket.produced:
            release(self, ticket, now)

    patch.setattr(Admission, "release", mutant)


def evicted_counted_as_canceled_too(patch: Patch) -> None:
    evict = Admission._evict

    def mutant(self: Admission, ticket: Ticket, refusal: Refusal, now: float) -> Ticket:
        ticket.seat.outcomes[Outcome.CANCELED] += ticket.count
        return evict(self, ticket, refusal, now)

    patch.setattr(Admission, "_evict", mutant)


def no_settlement(patch: Patch) -> None:
    patch.setattr(TokenBucket, "give_back", lambda self, units, now: None)


def refused_request_is_debited(patch: Patch) -> None:
    refusal_of = Limits.refusal

    def mutant(self: Limits, seat: Seat, asks: Sequence[Ask], slots: int, now: float) -> Refusal | None:
        refusal = refusal_of(self, seat, asks, slots, now)
        if refusal is not None:
            seat.requests.take(1, now)
        return refusal

    patch.setattr(Limits, "refusal", mutant)


def limits_not_enforced(patch: Patch) -> None:
    patch.setattr(TokenBucket, "wait_s", lambda self, units, now: 0.0)


def retry_after_too_short(patch: Patch) -> None:
    wait_s = TokenBucket.wait_s
    patch.setattr(TokenBucket, "wait_s", lambda self, units, now: wait_s(self, units, now) / 2)


def retry_after_of_the_first_limit_only(patch: Patch) -> None:
    def mutant(self: Limits, seat: Seat, asks: Sequence[Ask], slots: int, now: float) -> Refusal | None:
        count = sum(ask.count for ask in asks)
        return (
            self._size_refusal(seat, asks, slots)
            or self._request_limit_refusal(seat, count, now)
            or self._token_limit_refusal(seat, asks, now)
            or self._queue_refusal(seat, count)
        )

    patch.setattr(Limits, "refusal", mutant)


def group_reserves_more_than_the_limit(patch: Patch) -> None:
    enqueue = Admission._enqueue

    def mutant(self: Admission, seat: Seat, ask: Ask, reserved_tokens: int, now: float) -> Ticket:
        return enqueue(self, seat, ask, ask.input_tokens + seat.expected(ask.count, ask.max_tokens), now)

    patch.setattr(Admission, "_enqueue", mutant)


def queue_unbounded(patch: Patch) -> None:
    patch.setattr(Limits, "_queue_refusal", lambda self, seat, count: None)


def queue_refuses_at_half(patch: Patch) -> None:
    bound = Limits._queue_bound
    patch.setattr(Limits, "_queue_bound", lambda self, seat: bound(self, seat) // 2)


def timeout_too_early(patch: Patch) -> None:
    enqueue = Admission._enqueue

    def mutant(self: Admission, seat: Seat, ask: Ask, reserved_tokens: int, now: float) -> Ticket:
        ticket = enqueue(self, seat, ask, reserved_tokens, now)
        ticket.expires_at = now + self.policy.queue_timeout_s / 2
        return ticket

    patch.setattr(Admission, "_enqueue", mutant)


def no_timeout(patch: Patch) -> None:
    patch.setattr(Admission, "expire", lambda self, now: [])


def block_end_keeps_the_queue(patch: Patch) -> None:
    close = Admission.close_seat

    def mutant(self: Admission, seat_id: str, reason: Reason, now: float) -> list[Ticket]:
        patch_queue = self._seats[seat_id].queue
        self._seats[seat_id].queue = type(patch_queue)()
        evicted = close(self, seat_id, reason, now)
        self._seats[seat_id].queue = patch_queue
        return evicted

    patch.setattr(Admission, "close_seat", mutant)


def closed_seat_is_served(patch: Patch) -> None:
    patch.setattr(Admission, "_closed_refusal", lambda self, seat: None)


def ledger_forgets_deadlines(patch: Patch) -> None:
    def mutant(self: Ledger, number: int, count: int, deadline: float) -> None:
        self._waiting[number] = (deadline, count)

    patch.setattr(Ledger, "expect", mutant)


def ledger_owes_for_all_requests(patch: Patch) -> None:
    patch.setattr(Ledger, "rate", property(lambda self: self._guarantee * self._owing))


def all_prompts_are_due_at_once(patch: Patch) -> None:
    due = Admission._due

    def mutant(self: Admission, seat: Seat, ask: Ask, now: float) -> float:
        seat.read_by = 0.0
        return due(self, seat, ask, now)

    patch.setattr(Admission, "_due", mutant)


def ledger_misses_deliveries(patch: Patch) -> None:
    deliver: Any = Ledger.deliver
    patch.setattr(Ledger, "deliver", lambda self, tokens, now: deliver(self, min(tokens, 1), now))


def nothing_is_held(patch: Patch) -> None:
    patch.setattr(StepPolicy, "_set_held", lambda self, stream, held, now: None)


def borrowed_work_gives_way_nowhere(patch: Patch) -> None:
    """Not between steps, not with its prompts, and not at the entry."""
    nothing_is_held(patch)
    plan = StepPolicy.plan

    def mutant(self: StepPolicy, now: float) -> Plan:
        found = plan(self, now)
        self._entry.lift()
        return Plan(found.changed, None)

    patch.setattr(StepPolicy, "plan", mutant)


def holds_outlast_their_reason(patch: Patch) -> None:
    hold_beyond = StepPolicy._hold_beyond

    def mutant(self: StepPolicy, room: int, fitting: list[Stream], now: float) -> None:
        if room < self._borrowed_count():
            hold_beyond(self, room, fitting, now)

    patch.setattr(StepPolicy, "_hold_beyond", mutant)


def held_ones_never_rotate(patch: Patch) -> None:
    in_order = StepPolicy._in_order

    def mutant(self: StepPolicy) -> Iterator[Stream]:
        return iter(sorted(in_order(self), key=lambda stream: stream.held))

    patch.setattr(StepPolicy, "_in_order", mutant)
    patch.setattr(StepPolicy, "_bring_to_room", lambda self, now: None)


def owed_streams_are_held_too(patch: Patch) -> None:
    set_held = StepPolicy._set_held

    def mutant(self: StepPolicy, stream: Stream, held: bool, now: float) -> None:
        set_held(self, stream, held or (stream.owed and self.held > 0), now)

    patch.setattr(StepPolicy, "_set_held", mutant)


def owed_streams_are_preempted_first(patch: Patch) -> None:
    rank: Any = StepPolicy.rank

    def mutant(self: StepPolicy, stream_id: object) -> tuple[object, ...]:
        borrowed, *others = rank(self, stream_id)
        return (not borrowed, *others)

    patch.setattr(StepPolicy, "rank", mutant)


def borrowed_work_is_kept_out(patch: Patch) -> None:
    limit_borrowed = StepPolicy._limit_borrowed

    def mutant(self: StepPolicy, useful: int, now: float) -> None:
        limit_borrowed(self, useful if self.allowed_s else 1, now)

    patch.setattr(StepPolicy, "_limit_borrowed", mutant)


def prompts_of_any_length_in_a_step(patch: Patch) -> None:
    patch.setattr(StepPolicy, "_plan_prompts", lambda self, now: None)


def decodes_take_the_tokens_of_owed_prompts(patch: Patch) -> None:
    patch.setattr(Prompts, "most_decodes", lambda self, *_: UNLIMITED)


def a_late_first_token_is_forgiven(patch: Patch) -> None:
    patch.setattr(StepSeat, "owing", StepSeat.paced)


def a_slower_machine_is_not_noticed(patch: Patch) -> None:
    """The fit does not learn, and no lag is made up for."""
    follow = Paces.follow

    def mutant(self: Paces, seat: StepSeat, decoded: int, now: float) -> None:
        seat.counted_at = None
        follow(self, seat, decoded, now)

    patch.setattr(Paces, "follow", mutant)
    patch.setattr(StepTimeFit, "observe", lambda self, *_: None)


@dataclass(frozen=True)
class Mutation:
    apply: Callable[[Patch], None]
    caught_by: tuple[str, ...]
    aimed: bool = False
    """Whether an aimed run shows it sooner than random ones."""
    seeds: Sequence[int] = SEEDS
    """Of the random adversaries."""


MUTATIONS = [
    Mutation(no_lift, ("fairness",)),
    Mutation(weight_ignored, ("fairness", "flood proof")),
    Mutation(output_free, ("fairness", "flood proof")),
    Mutation(input_free, ("fairness", "flood proof")),
    Mutation(output_never_corrected, ("fairness", "flood proof")),
    Mutation(no_refund, ("fairness", "flood proof")),
    Mutation(prefix_hits_not_refunded, ("fairness", "flood proof")),
    Mutation(charge_shrinks_with_the_queue, ("fairness", "flood proof")),
    Mutation(largest_tag_first, ("fairness", "flood proof")),
    Mutation(virtual_time_falls, ("order",)),
    Mutation(last_come_first_served, ("order",)),
    Mutation(owed_work_waits_for_free_slots, ("entry guarantee",)),
    Mutation(borrowed_work_takes_owed_room, ("room",)),
    Mutation(prefix_hits_stay_in_the_owed_account, ("room", "entry guarantee", "work conservation")),
    Mutation(block_end_leaves_owed_kv_cache_taken, ("entry guarantee",), aimed=True),
    Mutation(nobody_is_owed, ("entry guarantee",)),
    Mutation(kv_cache_ignored, ("room",)),
    Mutation(slots_ignored, ("room",)),
    Mutation(slots_are_left_free_for_nobody, ("work conservation",)),
    Mutation(borrowed_work_goes_far_ahead, ("room",)),
    Mutation(no_slot_is_left_to_owed_requests, ("room",)),
    Mutation(one_entry_at_a_time, ("work conservation",)),
    Mutation(released_twice_counts_twice, ("one outcome",)),
    Mutation(canceled_lease_leaks, ("one outcome",)),
    Mutation(evicted_counted_as_canceled_too, ("one outcome",)),
    Mutation(no_settlement, ("honest refusals",)),
    Mutation(refused_request_is_debited, ("honest refusals",)),
    Mutation(limits_not_enforced, ("honest refusals",)),
    Mutation(retry_after_too_short, ("honest refusals",)),
    Mutation(retry_after_of_the_first_limit_only, ("honest refusals",), aimed=True),
    Mutation(group_reserves_more_than_the_limit, ("honest refusals",), aimed=True),
    Mutation(queue_unbounded, ("honest refusals",)),
    Mutation(queue_refuses_at_half, ("honest refusals",)),
    Mutation(timeout_too_early, ("honest refusals",)),
    Mutation(no_timeout, ("queue timeout",)),
    Mutation(block_end_keeps_the_queue, ("blocks",)),
    Mutation(closed_seat_is_served, ("blocks", "honest refusals")),
    Mutation(ledger_forgets_deadlines, ("ledger",)),
    Mutation(ledger_owes_for_all_requests, ("ledger",)),
    Mutation(all_prompts_are_due_at_once, ("ledger",)),
    Mutation(ledger_misses_deliveries, ("ledger",)),
    Mutation(nothing_is_held, ("pace",), aimed=True),
    Mutation(borrowed_work_gives_way_nowhere, ("pace",)),
    Mutation(holds_outlast_their_reason, ("needless hold", "work conservation")),
    Mutation(held_ones_never_rotate, ("starvation",), aimed=True),
    Mutation(owed_streams_are_held_too, ("victims", "pace")),
    Mutation(owed_streams_are_preempted_first, ("victims",)),
    Mutation(borrowed_work_is_kept_out, ("work conservation",)),
    Mutation(prompts_of_any_length_in_a_step, ("stall", "pace")),
    Mutation(decodes_take_the_tokens_of_owed_prompts, ("pace",), aimed=True),
    Mutation(a_late_first_token_is_forgiven, ("pace",), seeds=(3_809,)),
]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.apply.__name__)
def test_broken_promise_is_seen(mutation: Mutation, monkeypatch: Patch) -> None:
    mutation.apply(monkeypatch)
    runs = [evidence.broken_by_random_adversaries(mutation.seeds), evidence.broken_by_aimed_runs()]
    if mutation.aimed or "fairness" in mutation.caught_by:  # a drift takes long runs to show
        runs.reverse()
    told = (line for line in chain(*runs) if line.startswith(mutation.caught_by))
    caught = next(told, None)
    assert caught is not None


def test_a_machine_that_slows_down_unnoticed_costs_a_pace(monkeypatch: Patch) -> None:
    """And nothing else does: on the same node without the drop the same mutant keeps it."""
    seed, scenario = 99, random_scenario(99)
    assert scenario.seed_step_time == scenario.step_time
    a_slower_machine_is_not_noticed(monkeypatch)
    told = evidence.broken_in(scenario, seed)
    assert any(line.startswith("pace") for line in told)
    assert not evidence.broken_in(replace(scenario, changes=()), seed)
