"""Rules of the admission stage, one test each."""

import math
import time

import pytest

from scheduler import Admission, Ask, Capacity, Outcome, Policy, Reason, Refusal, SeatTerms, State, Ticket

HUGE = 1_000_000_000


def terms(
    seat_id: str,
    quantity: int = 1,
    guarantee: float = 0.0,
    rpm: int = HUGE,
    tpm: int = HUGE,
    prefill: float = 1_000.0,
) -> SeatTerms:
    return SeatTerms(seat_id, quantity, guarantee, prefill, rpm, tpm)


def node(*seats: SeatTerms, slots: int = 8, kv: int = 1_000_000, policy: Policy | None = None) -> Admission:
    admission = Admission(Capacity(slots, kv), policy)
    for seat in seats:
        admission.open_seat(seat, 0.0)
    return admission


def ask(input_tokens: int = 100, max_tokens: int = 100, count: int = 1) -> Ask:
    return Ask(input_tokens, max_tokens, count)


def put(admission: Admission, seat_id: str, *asks: Ask, now: float = 0.0) -> list[Ticket]:
    answer = admission.submit(seat_id, asks or (ask(),), now)
    assert not isinstance(answer, Refusal), answer
    return answer


def refused(admission: Admission, seat_id: str, *asks: Ask, now: float = 0.0) -> Refusal:
    answer = admission.submit(seat_id, asks or (ask(),), now)
    assert isinstance(answer, Refusal)
    return answer


def seats_of(tickets: list[Ticket]) -> str:
    return "".join(ticket.seat.terms.seat_id for ticket in tickets)


def tag(admission: Admission, seat_id: str, now: float = 0.0) -> float:
    return admission.read(seat_id, now).virtual_time


# --- the guarantee: owed seats and borrowed work ---------------------------------------------------


def test_lone_seat_gets_every_slot_whatever_idle_seats_are_guaranteed() -> None:
    admission = node(terms("a", guarantee=50), terms("b", quantity=20, guarantee=50), slots=8)
    put(admission, "a", *[ask()] * 20)
    assert len(admission.dispatch(0.0)) == 8


def test_owed_work_never_exceeds_the_slots() -> None:
    admission = node(*(terms(name, guarantee=50) for name in "abcdef"), slots=4)
    for name in "abcdef":
        put(admission, name)
    assert seats_of(admission.dispatch(0.0)) == "abcd"


def test_borrowed_work_enters_only_while_the_step_policy_has_use_for_it() -> None:
    admission = node(terms("a", guarantee=50), terms("b", guarantee=50), slots=8)
    admission.borrowed_limit = 3
    put(admission, "a", *[ask()] * 20)
    assert len(admission.dispatch(0.0)) == 1 + 3
    put(admission, "b")
    assert seats_of(admission.dispatch(0.0)) == "b"
    admission.borrowed_limit = 4
    assert len(admission.dispatch(0.0)) == 1


def test_as_many_as_end_in_a_moment_enter_ahead_of_their_slots() -> None:
    admission = node(terms("a"), terms("b", guarantee=50), slots=32)
    put(admission, "a", *[ask()] * 80)
    first = admission.dispatch(0.0)
    assert len(first) == 32, "nothing has ended yet"
    for ticket in first[:20]:
        admission.release(ticket, 1.0)
    assert len(admission.dispatch(1.0)) == 21, "20 ended in a second: one more in 30 ms"
    for ticket in first[20:]:
        admission.release(ticket, 1.0)
    for ticket in admission.dispatch(1.0):
        admission.release(ticket, 1.0)
    admission.dispatch(1.0)
    assert admission.in_flight == 34, "a sixteenth of the slots at most"
    put(admission, "b", now=1.0)
    assert seats_of(admission.dispatch(1.0)) == "b", "owed work enters whatever waits inside"


def test_borrowed_work_leaves_slots_to_owed_requests_that_keep_coming() -> None:
    admission = node(terms("a"), terms("b", guarantee=50), slots=32)
    put(admission, "a", *[ask()] * 80)
    running = admission.dispatch(0.0)
    for second in (1.0, 2.0, 3.0):
        [owed] = put(admission, "b", now=second)
        assert admission.dispatch(second) == [owed]
        admission.release(owed, second)
        admission.release(running.pop(), second)
        running += admission.dispatch(second)
    assert admission.in_flight == 31, "one slot waits for the next"
    admission.dispatch(10.0)
    assert admission.in_flight == 33, "nobody has come for long"


def test_nothing_enters_ahead_that_would_only_be_held() -> None:
    admission = node(terms("a"), slots=32)
    put(admission, "a", *[ask()] * 80)
    for ticket in admission.dispatch(0.0):
        admission.release(ticket, 0.0)
    admission.borrowed_limit = 20
    assert len(admission.dispatch(0.0)) == 20


def test_request_wider_than_the_borrowed_limit_enters_once_no_borrowed_work_runs() -> None:
    admission = node(terms("a"), slots=8)
    admission.borrowed_limit = 2
    [small, wide] = put(admission, "a", ask(), ask(count=6))
    assert admission.dispatch(0.0) == [small]
    admission.release(small, 1.0)
    assert admission.dispatch(1.0) == [wide]


def test_owed_seat_enters_at_once_on_a_node_full_of_borrowed_work() -> None:
    admission = node(terms("a", guarantee=50), terms("b", guarantee=50), slots=8)
    put(admission, "a", *[ask()] * 20)
    admission.dispatch(0.0)
    put(admission, "b")
    assert seats_of(admission.dispatch(0.0)) == "b"


def test_owed_seat_enters_before_borrowed_work() -> None:
    admission = node(terms("a", guarantee=50), terms("b", guarantee=50), slots=4)
    put(admission, "a")
    admission.dispatch(0.0)
    put(admission, "a")
    put(admission, "b", ask(input_tokens=900))
    assert seats_of(admission.dispatch(0.0)) == "ba"


def test_owed_seats_enter_by_first_token_deadline() -> None:
    admission = node(terms("a", guarantee=50), terms("b", guarantee=50, prefill=10_000.0))
    put(admission, "a", ask(input_tokens=5_000))
    put(admission, "b", ask(input_tokens=5_000))
    assert seats_of(admission.dispatch(0.0)) == "ba"


def test_deadline_is_the_grace_plus_the_time_to_read_the_prompt() -> None:
    admission = node(terms("a", guarantee=50, prefill=200.0))
    [ticket] = put(admission, "a", ask(input_tokens=100), now=10.0)
    assert ticket.deadline == 10.0 + 1.0 + 0.5


def test_prompts_that_come_faster_than_the_seats_read_are_due_one_after_the_other() -> None:
    admission = node(terms("a", 2, guarantee=50, prefill=200.0))
    tickets = put(admission, "a", *[ask(input_tokens=100)] * 4, now=10.0)
    assert [ticket.deadline for ticket in tickets] == [11.5, 11.5, 11.75, 12.0]
    [later] = put(admission, "a", ask(input_tokens=100), now=20.0)
    assert later.deadline == 21.5


@pytest.mark.parametrize("end", ["answered", "canceled", "evicted"])
def test_prompts_that_are_no_longer_unread_leave_no_debt(end: str) -> None:
    """Whether the machine read them early, or never has to."""
    admission = node(terms("a", guarantee=50, prefill=200.0))
    tickets = put(admission, "a", *[ask(input_tokens=100)] * 20, now=10.0)
    if end == "evicted":
        admission.close_seat("a", Reason.OUTSIDE_BLOCK, 10.5)
        admission.open_seat(terms("a", guarantee=50, prefill=200.0), 10.5)
    for ticket in tickets:
        if end == "answered":
            admission.dispatch(10.5)
            admission.record_step([(ticket, 1)], 10.5)
        admission.release(ticket, 10.5)
    [next_one] = put(admission, "a", ask(input_tokens=100), now=11.0)
    assert next_one.deadline == 11.0 + 0.5 + 1.0


def test_a_seat_that_reopens_has_its_kv_cache_back() -> None:
    admission = node(terms("a", guarantee=50), terms("b", guarantee=50), slots=4, kv=1_000)
    put(admission, "a", ask(input_tokens=600))
    assert seats_of(admission.dispatch(0.0)) == "a"
    admission.close_seat("a", Reason.OUTSIDE_BLOCK, 1.0)
    put(admission, "b", ask(input_tokens=300), now=1.0)
    assert seats_of(admission.dispatch(1.0)) == "b", "borrowed work makes way"
    admission.open_seat(terms("a", guarantee=50), 2.0)
    admission.open_seat(terms("c", guarantee=50), 2.0)
    put(admission, "c", ask(input_tokens=50), now=2.0)
    assert seats_of(admission.dispatch(2.0)) == ""


def test_request_wider_than_the_unused_seats_is_borrowed_and_keeps_nobody_out() -> None:
    admission = node(terms("a", guarantee=50), *(terms(x, guarantee=50) for x in "bcd"), slots=8)
    put(admission, "a", *[ask(count=4)] * 3)
    assert len(admission.dispatch(0.0)) == 2
    for name in "bcd":
        put(admission, name)
    assert sorted(seats_of(admission.dispatch(0.0))) == ["b", "c", "d"]


def test_owed_work_may_use_the_kv_cache_that_borrowed_work_holds() -> None:
    admission = node(terms("a"), terms("b", guarantee=50), terms("c", guarantee=50), kv=1_000)
    put(admission, "a", *[ask(input_tokens=400, max_tokens=100)] * 3)
    assert len(admission.dispatch(0.0)) == 2
    put(admission, "b", ask(input_tokens=800, max_tokens=100))
    assert seats_of(admission.dispatch(0.0)) == "b"
    put(admission, "c", ask(input_tokens=50, max_tokens=51))
    assert admission.dispatch(0.0) == []


def test_prompt_that_the_kv_cache_cannot_hold_beside_others_runs_alone() -> None:
    admission = node(terms("a"), kv=1_000)
    [small, large] = put(admission, "a", ask(), ask(input_tokens=990))
    assert admission.dispatch(0.0) == [small]
    admission.release(small, 1.0)
    assert admission.dispatch(1.0) == [large]


# --- the excess: start-time fair queuing -------------------------------------------------------------


def dispatched_shares(admission: Admission, turns: int) -> dict[str, int]:
    """Keep one slot busy with requests of full length; returns dispatches by seat."""
    shares: dict[str, int] = {}
    for turn in range(turns):
        [ticket] = admission.dispatch(float(turn))
        shares[seats_of([ticket])] = shares.get(seats_of([ticket]), 0) + 1
        admission.record_step([(ticket, ticket.max_tokens * ticket.count)], float(turn))
        admission.release(ticket, float(turn))
    return shares


def test_equal_seats_take_turns_whatever_their_queues() -> None:
    admission = node(terms("a"), terms("b"), slots=1)
    put(admission, "a", *[ask()] * 200)
    put(admission, "b", *[ask()] * 60)
    shares = dispatched_shares(admission, 100)
    assert abs(shares["a"] - shares["b"]) <= 2


def test_share_is_proportional_to_weight() -> None:
    admission = node(terms("a"), terms("b", quantity=3), slots=1)
    for name in "ab":
        put(admission, name, *[ask()] * 200)
    shares = dispatched_shares(admission, 200)
    assert shares["b"] / shares["a"] == pytest.approx(3, rel=0.05)


def test_longer_prompts_get_fewer_turns() -> None:
    admission = node(terms("a"), terms("b"), slots=1)
    put(admission, "a", *[ask(input_tokens=1_000)] * 200)  # cost 1200
    put(admission, "b", *[ask(input_tokens=200)] * 200)  # cost 400
    shares = dispatched_shares(admission, 200)
    assert shares["b"] / shares["a"] == pytest.approx(3, rel=0.05)


def test_cost_is_input_plus_twice_the_output_by_weight() -> None:
    admission = node(terms("a", quantity=2))
    [ticket] = put(admission, "a", ask(input_tokens=100, max_tokens=50))
    admission.dispatch(0.0)
    admission.record_step([(ticket, 50)], 1.0)
    assert tag(admission, "a") == (100 + 2 * 50) / 2


def test_a_quarter_of_the_expected_output_is_charged_at_dispatch_and_the_rest_as_it_comes() -> None:
    admission = node(terms("a"))
    [ticket] = put(admission, "a", ask(input_tokens=100, max_tokens=80))
    admission.dispatch(0.0)
    assert tag(admission, "a") == 100 + 2 * 20
    admission.record_step([(ticket, 15)], 1.0)
    assert tag(admission, "a") == 100 + 2 * 20
    admission.record_step([(ticket, 45)], 2.0)
    assert tag(admission, "a") == 100 + 2 * 60


def test_expected_output_is_the_running_mean_and_at_most_max_tokens() -> None:
    admission = node(terms("a"), policy=Policy(initial_output_tokens=40.0, output_mean_smoothing=0.5))
    [first] = put(admission, "a", ask(max_tokens=1_000))
    admission.dispatch(0.0)
    assert first.expected_output == 40
    admission.record_step([(first, 100)], 1.0)
    admission.release(first, 1.0)
    second, third = put(admission, "a", ask(max_tokens=1_000), ask(max_tokens=7), now=1.0)
    admission.dispatch(1.0)
    assert (second.expected_output, third.expected_output) == (70, 7)


def test_output_beyond_the_expected_is_charged_as_it_flows() -> None:
    admission = node(terms("a"), policy=Policy(initial_output_tokens=10.0))
    [ticket] = put(admission, "a", ask(input_tokens=100))
    admission.dispatch(0.0)
    admission.record_step([(ticket, 10)], 0.1)
    assert tag(admission, "a") == 120
    admission.record_step([(ticket, 5)], 0.2)
    assert tag(admission, "a") == 130


def test_output_that_never_came_is_refunded_at_the_end() -> None:
    admission = node(terms("a"))
    [ticket] = put(admission, "a", ask(input_tokens=100, max_tokens=50))
    admission.dispatch(0.0)
    admission.record_step([(ticket, 20)], 0.1)
    admission.release(ticket, 0.2)
    assert tag(admission, "a") == 100 + 2 * 20


def test_prefix_hits_are_refunded_once() -> None:
    admission = node(terms("a"))
    [ticket] = put(admission, "a", ask(input_tokens=100, max_tokens=50))
    admission.dispatch(0.0)
    for _ in range(3):
        admission.record_prefix_hit(ticket, 80)
    assert tag(admission, "a") == 20 + 2 * 12


def test_idle_seat_earns_no_credit() -> None:
    admission = node(terms("a"), terms("b"), slots=1)
    put(admission, "a", *[ask()] * 200)
    dispatched_shares(admission, 100)
    put(admission, "b", *[ask()] * 60)
    shares = dispatched_shares(admission, 50)
    assert abs(shares["a"] - shares["b"]) <= 2


def test_seat_that_borrowed_an_idle_machine_owes_nothing_for_it() -> None:
    admission = node(terms("a"), terms("b"), slots=1)
    put(admission, "a", *[ask()] * 200)
    dispatched_shares(admission, 100)
    put(admission, "b", *[ask()] * 100)
    shares = dispatched_shares(admission, 20)
    assert shares["a"] >= 9


def test_refund_of_work_paid_before_an_idle_spell_is_no_credit() -> None:
    admission = node(terms("a"), terms("b"), slots=2)
    [old] = put(admission, "a", ask(max_tokens=200))  # charged 500
    admission.dispatch(0.0)
    put(admission, "b", *[ask()] * 20)
    dispatched_shares(admission, 10)
    put(admission, "a")
    joined_at = tag(admission, "a")
    assert joined_at > 500
    admission.release(old, 10.0)
    assert tag(admission, "a") == joined_at


def test_virtual_time_never_decreases() -> None:
    admission = node(terms("a"), terms("b", guarantee=50), slots=3)
    seen = [admission.virtual_time]
    for turn in range(50):
        put(admission, "a" if turn % 3 else "b", ask(max_tokens=1 + 37 * turn % 90), now=float(turn))
        for ticket in admission.dispatch(float(turn)):
            admission.record_prefix_hit(ticket, 50)
            admission.release(ticket, float(turn))
        seen.append(admission.virtual_time)
    assert seen == sorted(seen)
    assert seen[-1] > 0


def test_requests_of_one_seat_enter_in_order_of_arrival() -> None:
    admission = node(terms("a"), slots=8)
    tickets = put(admission, "a", *[ask(input_tokens=size) for size in (50, 5, 500)])
    assert admission.dispatch(0.0) == tickets


# --- limits -----------------------------------------------------------------------------------------


def test_request_limit_refuses_with_the_figures() -> None:
    admission = node(terms("a", rpm=2))
    put(admission, "a", ask(), ask())
    refusal = refused(admission, "a")
    assert refusal == Refusal(Reason.REQUEST_LIMIT, 30.0, limit=2, used=2, requested=1)


def test_token_limit_reserves_input_plus_expected_output() -> None:
    admission = node(terms("a", tpm=1_000))
    put(admission, "a", ask(input_tokens=100, max_tokens=300))
    assert admission.read_limits("a", 0.0)[1].remaining == 1_000 - 100 - 256
    put(admission, "a", ask(input_tokens=100, max_tokens=50))
    assert admission.read_limits("a", 0.0)[1].remaining == 644 - 150


def test_token_limit_settles_at_the_end_by_what_was_used() -> None:
    admission = node(terms("a", tpm=1_000))
    [ticket] = put(admission, "a", ask(input_tokens=100, max_tokens=300))
    admission.dispatch(0.0)
    admission.record_step([(ticket, 20)], 0.0)
    admission.release(ticket, 0.0)
    assert admission.read_limits("a", 0.0)[1].remaining == 880


def test_canceled_in_the_queue_gives_all_its_tokens_back() -> None:
    admission = node(terms("a", tpm=1_000))
    [ticket] = put(admission, "a")
    admission.release(ticket, 0.0)
    assert admission.read_limits("a", 0.0)[1].remaining == 1_000
    assert admission.read("a", 0.0).requests[Outcome.CANCELED.value] == 1


def test_remaining_is_never_shown_negative() -> None:
    admission = node(terms("a", tpm=500), policy=Policy(initial_output_tokens=1.0))
    [ticket] = put(admission, "a", ask(max_tokens=5_000))
    admission.dispatch(0.0)
    admission.record_step([(ticket, 3_000)], 0.0)
    admission.release(ticket, 0.0)
    tokens = admission.read_limits("a", 0.0)[1]
    assert tokens.remaining == 0
    assert tokens.reset_s == pytest.approx(60 * 3_100 / 500)


def test_group_reserves_no_more_than_the_token_limit() -> None:
    admission = node(terms("a", tpm=300))
    tickets = put(admission, "a", *[ask(input_tokens=10, max_tokens=250)] * 3)
    assert sum(ticket.reserved_tokens for ticket in tickets) == 300
    for ticket in tickets:
        admission.release(ticket, 0.0)
    assert admission.read_limits("a", 0.0)[1].remaining == 300


def test_refused_request_costs_nothing() -> None:
    admission = node(terms("a", rpm=5, tpm=1_000))
    put(admission, "a", ask(input_tokens=600, max_tokens=100))
    before = admission.read_limits("a", 0.0)
    assert refused(admission, "a", ask(input_tokens=600)).reason is Reason.TOKEN_LIMIT
    assert refused(admission, "a", *[ask(1, 1)] * 5).reason is Reason.REQUEST_LIMIT
    assert admission.read_limits("a", 0.0) == before
    assert admission.queued() == 1


def test_evicted_request_costs_nothing() -> None:
    admission = node(terms("a", rpm=5, tpm=1_000))
    before = admission.read_limits("a", 0.0)
    put(admission, "a")
    admission.close_seat("a", Reason.OUTSIDE_BLOCK, 0.0)
    assert admission.read_limits("a", 0.0) == before


@pytest.mark.parametrize("now", [0.0, 123_456.789, 9_999_999.9])
@pytest.mark.parametrize(("rpm", "tpm"), [(7, HUGE), (HUGE, 700), (3, 350), (10**6, 10**8)])
def test_retry_after_is_when_a_retry_is_admitted(rpm: int, tpm: int, now: float) -> None:
    admission = Admission(Capacity(8, 10**9))
    admission.open_seat(terms("a", rpm=rpm, tpm=tpm), now)
    wanted = [ask(input_tokens=min(100, tpm // 4), max_tokens=min(250, tpm))] * 2
    if tpm == 10**8:
        wanted = [ask(input_tokens=33_333_333, max_tokens=1)]
    while True:
        answer = admission.submit("a", wanted, now)
        if isinstance(answer, Refusal):
            break
        for ticket in answer:  # ended, but their requests and half of their tokens are used up
            admission.dispatch(now)
            if ticket.state is State.RUNNING:
                admission.record_step([(ticket, 100)], now)
                admission.release(ticket, now)
    assert answer.retry_after_s is not None
    assert isinstance(admission.submit("a", wanted, now + 0.9 * answer.retry_after_s), Refusal)
    assert not isinstance(admission.submit("a", wanted, now + answer.retry_after_s), Refusal)


def test_retry_after_waits_for_every_limit_that_refuses() -> None:
    admission = node(terms("a", rpm=60, tpm=600))
    put(admission, "a", *[ask(input_tokens=1, max_tokens=1)] * 59, ask(input_tokens=382, max_tokens=100))
    refusal = refused(admission, "a", ask(input_tokens=500, max_tokens=100), ask(1, 1))
    assert refusal.reason is Reason.REQUEST_LIMIT
    assert refusal.retry_after_s == 60.0


def test_request_that_no_waiting_would_admit_has_no_retry_after() -> None:
    admission = node(terms("a", rpm=5, tpm=1_000), slots=4)
    for reason, asks in (
        (Reason.TOO_WIDE, [ask(count=5)]),
        (Reason.TOO_MANY, [ask(1, 1)] * 6),
        (Reason.TOO_LARGE, [ask(input_tokens=1_000)]),
    ):
        refusal = refused(admission, "a", *asks)
        assert (refusal.reason, refusal.retry_after_s) == (reason, None)


def test_group_is_queued_all_or_nothing() -> None:
    admission = node(terms("a", rpm=5))
    put(admission, "a", ask(count=2))
    refused(admission, "a", ask(count=2), ask(count=2))
    assert admission.read("a", 0.0).queued == 1
    assert len(put(admission, "a", ask(count=2), ask())) == 2


def test_token_counting_takes_one_request_and_no_tokens() -> None:
    admission = node(terms("a", rpm=2, tpm=100))
    assert admission.charge_request("a", 0.0) is None
    requests, tokens = admission.read_limits("a", 0.0)
    assert (requests.remaining, tokens.remaining) == (1, 100)
    admission.charge_request("a", 0.0)
    refusal = admission.charge_request("a", 0.0)
    assert refusal is not None
    assert refusal.reason is Reason.REQUEST_LIMIT


def test_queue_is_bounded_per_seat_and_by_quantity() -> None:
    admission = node(terms("a"), terms("b", quantity=2), policy=Policy(max_queued_per_seat=3))
    for name, bound in (("a", 3), ("b", 6)):
        put(admission, name, *[ask()] * bound)
        refusal = refused(admission, name)
        assert (refusal.reason, refusal.limit, refusal.used) == (Reason.QUEUE_FULL, bound, bound)
        assert refusal.retry_after_s is not None
        assert 0 < refusal.retry_after_s <= 60


# --- ends --------------------------------------------------------------------------------------------


def test_queued_request_is_evicted_at_the_queue_timeout_and_not_before() -> None:
    admission = node(terms("a"), slots=1)
    put(admission, "a", ask(), now=0.0)
    admission.dispatch(0.0)
    [waiting] = put(admission, "a", ask(), now=5.0)
    assert admission.next_expiry() == 65.0
    assert admission.expire(64.999) == []
    assert admission.expire(65.0) == [waiting]
    assert waiting.refusal is not None
    assert waiting.refusal.reason is Reason.QUEUE_TIMEOUT
    assert admission.next_expiry() is None


def test_block_end_evicts_queued_and_lets_running_finish() -> None:
    admission = node(terms("a", guarantee=50), slots=1)
    running, queued = put(admission, "a", ask(), ask())
    assert admission.dispatch(0.0) == [running]
    assert admission.close_seat("a", Reason.OUTSIDE_BLOCK, 1.0) == [queued]
    assert (running.state, queued.state) == (State.RUNNING, State.EVICTED)
    assert refused(admission, "a").reason is Reason.OUTSIDE_BLOCK
    assert not admission.forget_seat("a")
    admission.record_step([(running, 10)], 2.0)
    admission.release(running, 2.0)
    assert admission.read("a", 2.0).output_tokens == 10
    assert admission.forget_seat("a")


def test_what_runs_of_a_closed_seat_is_borrowed_and_owed_again_when_it_reopens() -> None:
    admission = node(terms("a"), terms("b", quantity=2, guarantee=50), slots=4)
    put(admission, "b", ask(), ask())
    assert len(admission.dispatch(0.0)) == 2
    admission.borrowed_limit = 2
    admission.close_seat("b", Reason.OUTSIDE_BLOCK, 1.0)
    put(admission, "a")
    assert admission.dispatch(1.0) == []
    admission.open_seat(terms("b", quantity=2, guarantee=50), 2.0)
    assert seats_of(admission.dispatch(2.0)) == "a"


def test_new_terms_keep_queue_and_debts() -> None:
    admission = node(terms("a", rpm=10), slots=1)
    put(admission, "a", ask(), ask(), ask())
    admission.dispatch(0.0)
    before = tag(admission, "a")
    admission.open_seat(terms("a", rpm=20, quantity=2), 0.0)
    assert tag(admission, "a") == before
    assert admission.read("a", 0.0).queued == 2
    assert admission.read_limits("a", 0.0)[0].remaining == 17


def test_drain_evicts_the_queue_and_takes_nothing_new() -> None:
    admission = node(terms("a"), terms("b"), slots=1)
    [running] = put(admission, "a")
    admission.dispatch(0.0)
    put(admission, "a")
    put(admission, "b")
    assert len(admission.drain(1.0)) == 2
    assert refused(admission, "a").reason is Reason.DRAINING
    assert running.state is State.RUNNING


def test_every_ticket_ends_exactly_once() -> None:
    admission = node(terms("a", guarantee=50))
    [ticket] = put(admission, "a")
    admission.dispatch(0.0)
    for _ in range(3):
        admission.release(ticket, 1.0)
    reading = admission.read("a", 1.0)
    assert (admission.in_flight, reading.in_flight, reading.requests["dispatched"]) == (0, 0, 1)


def test_limits_go_by_the_clock_when_the_engine_has_ended_a_request_before() -> None:
    readings = []
    for ended_at in (None, 0.5):
        admission = node(terms("a", tpm=6_000))
        [ticket] = put(admission, "a", ask(1_000, 10), now=1.0)
        put(admission, "a", ask(1_000, 10), now=2.0)
        admission.dispatch(2.0)
        admission.release(ticket, 2.0, ended_at)
        readings.append(admission.read_limits("a", 3.0))
    assert readings[0] == readings[1], "no second is refilled twice"


def test_late_tokens_of_an_ended_request_count_as_delivered_and_cost_nothing_more() -> None:
    admission = node(terms("a"))
    [ticket] = put(admission, "a")
    admission.dispatch(0.0)
    admission.release(ticket, 1.0)
    before = tag(admission, "a")
    admission.record_step([(ticket, 2)], 1.1)
    assert admission.read("a", 1.1).output_tokens == 2
    assert tag(admission, "a") == before


# --- cost --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guarantee", [50, 0], ids=["owed", "borrowed"])
def test_decision_takes_at_most_100_us_at_p99_with_1000_seats_and_10000_queued(guarantee: float) -> None:
    seats = (terms(f"s{i}", quantity=1 + i % 3, guarantee=guarantee) for i in range(1_000))
    admission = node(*seats, slots=256)
    for i in range(1_000):
        put(admission, f"s{i}", *[ask(50 + i % 70, 100)] * 10)
    running = admission.dispatch(0.0)
    assert admission.queued() == 10_000 - len(running) > 9_000
    best, now = math.inf, 0.0
    # A shared machine may be slow for a minute: what the code takes shows in its first quiet moment.
    give_up_at = time.monotonic() + 150.0
    while best > 100e-6 and time.monotonic() < give_up_at:
        took = []
        now += 1.0
        for i in range(2_000):
            ticket = running.pop(0)
            seat_id = ticket.seat.terms.seat_id
            began = time.thread_time()
            admission.record_step([(ticket, 30 + i % 50)], now)
            admission.release(ticket, now)
            running += admission.dispatch(now)
            took.append(time.thread_time() - began)
            put(admission, seat_id, ask(50 + i % 70, 100), now=now)
        best = min(best, sorted(took)[int(0.99 * len(took))])
    assert best <= 100e-6, f"best batch's p99: {best * 1e6:.0f} us"


def test_without_a_prefix_cache_each_sibling_pays_its_prefill() -> None:
    policy = Policy(prefix_caching=False)
    admission = node(terms("a"), policy=policy)
    [ticket] = put(admission, "a", ask(1_000, 1, count=2))
    admission.dispatch(0.0)
    admission.record_step([(ticket, 2)], 1.0)
    assert tag(admission, "a") == 2 * 1_000 * policy.input_weight + 2 * policy.output_weight


def test_prefix_hits_make_room_in_the_kv_cache() -> None:
    admission = node(terms("a"), kv=1_000)
    first = put(admission, "a", ask(700, 10))[0]
    put(admission, "a", ask(700, 10))
    assert admission.dispatch(0.0) == [first]
    admission.record_prefix_hit(first, 690)
    assert len(admission.dispatch(0.0)) == 1


def test_full_queue_is_foreseen_for_what_would_queue() -> None:
    admission = node(terms("a"), slots=1, policy=Policy(max_queued_per_seat=2))
    put(admission, "a", ask(), ask())
    refusal = admission.foresee("a", 0.0)
    assert refusal is not None
    assert refusal.reason is Reason.QUEUE_FULL
    assert admission.charge_request("a", 0.0) is None


def test_seat_over_its_request_limit_is_foreseen() -> None:
    admission = node(terms("a", rpm=1))
    assert admission.foresee("a", 0.0) is None
    put(admission, "a", ask())
    refusal = admission.foresee("a", 0.0)
    assert refusal is not None
    assert refusal.reason is Reason.REQUEST_LIMIT
