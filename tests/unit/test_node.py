"""The scheduler under an event loop: waiting callers are woken, leaving ones are forgotten."""

from __future__ import annotations

import asyncio
import datetime
from dataclasses import dataclass, replace
from typing import Any

import pytest

from contract.blocks import Block
from contract.entitlements import (
    BlockTime,
    Entitlements,
    PledgeEntitlement,
    PledgeStatus,
    PoolStatus,
    PoolTerms,
)
from scheduler import Ask, Capacity, Policy, Reason
from serving.node import Node, RefusedError, StepOutput, Verdict, engine_request_id

MIDNIGHT = 1_800_000_000 - 1_800_000_000 % 86_400
ASK = Ask(input_tokens=10, max_tokens=20)


@dataclass
class Clocks:
    now: float = 100.0
    wall: float = MIDNIGHT + 3600.0

    def advance(self, seconds: float) -> None:
        self.now += seconds
        self.wall += seconds


def pledge(name: str = "a", **changes: Any) -> PledgeEntitlement:
    fields: dict[str, Any] = {
        "pledge_id": name,
        "key_sha256": (name * 64).encode().hex()[:64],
        "status": PledgeStatus.ACTIVE,
        "quantity": 1,
        "rpm_limit": 1000,
        "tpm_limit": 1_000_000,
        "blocks": (BlockTime.of(Block.NIGHT),),
        "valid_until": datetime.datetime(2100, 1, 1, tzinfo=datetime.UTC),
    }
    return PledgeEntitlement(**(fields | changes))


def snapshot(*pledges: PledgeEntitlement, revision: int = 1, guarantee_tok_s: float = 5.0) -> Entitlements:
    pool = PoolTerms(
        slug="p", status=PoolStatus.ACTIVE, guarantee_tok_s=guarantee_tok_s, prefill_tok_s=1000.0
    )
    return Entitlements(version=1, store_id="s", revision=revision, pool=pool, pledges=pledges)


def node_with(
    *pledges: PledgeEntitlement, slots: int = 1, policy: Policy | None = None
) -> tuple[Node, Clocks]:
    clocks = Clocks()
    node = Node(Capacity(slots, 100_000), policy, clock=lambda: clocks.now, wall_clock=lambda: clocks.wall)
    node.apply(snapshot(*pledges))
    return node, clocks


class Caller:
    """A request that enters and stays until told to leave."""

    def __init__(self, node: Node, verdict: Verdict, ask: Ask = ASK) -> None:
        self.leave = asyncio.Event()
        self.ticket_id: str | None = None
        self.task = asyncio.create_task(self._stay(node, verdict, ask))

    async def _stay(self, node: Node, verdict: Verdict, ask: Ask) -> None:
        async with node.enter(verdict, ask) as ticket:
            self.ticket_id = engine_request_id(ticket)
            await self.leave.wait()


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def assert_empty(node: Node) -> None:
    assert node.admission.in_flight == 0
    assert node.admission.queued() == 0
    assert not node._waiting
    assert not node._running


async def test_next_caller_enters_when_one_leaves() -> None:
    node, _ = node_with(pledge())
    first, second = Caller(node, Verdict(pledge())), Caller(node, Verdict(pledge()))
    await settle()
    assert first.ticket_id is not None
    assert second.ticket_id is None
    first.leave.set()
    await settle()
    assert second.ticket_id is not None
    second.leave.set()
    await settle()
    assert_empty(node)


async def test_a_node_is_idle_while_nobody_runs_or_waits_and_somebody_may_come() -> None:
    node, clocks = node_with(pledge())
    assert node.idle()
    caller = Caller(node, Verdict(pledge()))
    await settle()
    assert not node.idle()
    caller.leave.set()
    await settle()
    assert node.idle()
    node.drain()
    assert not node.idle()
    node, clocks = node_with(pledge())
    # It runs as soon as the node looks.
    node.admission.submit("a", [ASK], clocks.now)
    assert not node.idle()


async def test_slot_is_free_when_the_engine_is_done_however_slow_the_reader() -> None:
    node, _ = node_with(pledge())
    slow, second = Caller(node, Verdict(pledge())), Caller(node, Verdict(pledge()))
    await settle()
    assert slow.ticket_id is not None
    node.record_step([StepOutput(slow.ticket_id, 3, 0)], [slow.ticket_id])
    await settle()
    assert second.ticket_id is not None
    reading = node.admission.read("a", node.clock())
    assert reading.output_tokens == 3
    slow.leave.set()
    second.leave.set()
    await settle()
    assert_empty(node)


async def test_answer_is_owed_nothing_for_the_time_that_the_event_loop_lags() -> None:
    node, clocks = node_with(pledge())
    node.apply(snapshot(pledge(), revision=2, guarantee_tok_s=100.0))
    caller, second = Caller(node, Verdict(pledge())), Caller(node, Verdict(pledge()))
    await settle()
    name = caller.ticket_id
    assert name is not None
    # Five tokens within 40 ms, all of which the event loop sees 200 ms later.
    made_at = [clocks.now + 0.01 * step for step in range(5)]
    clocks.advance(0.24)
    for at in made_at[:-1]:
        node.record_step([StepOutput(name, 1, 0)], [], at)
    node.record_step([StepOutput(name, 1, 0)], [name], made_at[-1])
    reading = node.admission.read("a", clocks.now)
    assert reading.owed_tokens == pytest.approx(4.0)
    assert (reading.output_tokens, reading.shortfall_tokens) == (5, 0.0)
    assert reading.borrowed_tokens == pytest.approx(1.0), "the last token was due before it ended"
    await settle()
    assert second.ticket_id is not None, "the place is taken at once"
    # Its caller comes later still, and ends nothing a second time.
    caller.leave.set()
    await settle()
    assert node.admission.read("a", clocks.now).owed_tokens == pytest.approx(4.0)
    second.leave.set()
    await settle()
    assert_empty(node)


async def test_canceled_request_is_owed_its_rate_until_its_client_left() -> None:
    node, clocks = node_with(pledge())
    caller = Caller(node, Verdict(pledge()))
    await settle()
    assert caller.ticket_id is not None
    node.record_step([StepOutput(caller.ticket_id, 1, 0)], [], clocks.now)
    clocks.advance(2.0)
    caller.task.cancel()
    await settle()
    clocks.advance(10.0)
    assert node.admission.read("a", clocks.now).owed_tokens == pytest.approx(2.0 * 5.0)
    assert_empty(node)


@pytest.mark.parametrize("steps_before_cancel", range(6))
async def test_caller_canceled_at_any_moment_leaves_nothing(steps_before_cancel: int) -> None:
    node, _ = node_with(pledge())
    first, second = Caller(node, Verdict(pledge())), Caller(node, Verdict(pledge()))
    await settle()
    first.leave.set()
    for _ in range(steps_before_cancel):
        await asyncio.sleep(0)
    second.task.cancel()
    await settle()
    assert second.task.cancelled()
    assert_empty(node)


async def test_prompts_of_one_request_are_decided_together() -> None:
    node, _ = node_with(pledge(rpm_limit=3), slots=4)
    verdict = Verdict(pledge(), prompts=2)
    first = Caller(node, verdict)
    await settle()
    assert first.ticket_id is None, "waits for its sibling"
    second = Caller(node, verdict)
    await settle()
    assert first.ticket_id is not None
    assert second.ticket_id is not None
    refused = Verdict(pledge(), prompts=2)
    callers = [Caller(node, refused), Caller(node, refused)]
    await settle()
    assert refused.refusal is not None
    assert refused.refusal.reason is Reason.REQUEST_LIMIT
    for caller in callers:
        assert isinstance(caller.task.exception(), RefusedError)
    first.leave.set()
    second.leave.set()
    await settle()
    assert_empty(node)


async def test_eviction_of_one_prompt_refuses_the_whole_request() -> None:
    node, clocks = node_with(pledge(), slots=1, policy=Policy(queue_timeout_s=5))
    verdict = Verdict(pledge(), prompts=2)
    callers = [Caller(node, verdict), Caller(node, verdict)]
    await settle()
    clocks.advance(5)
    ticking = asyncio.create_task(node.run())
    await asyncio.wait_for(verdict.over.wait(), 2)
    ticking.cancel()
    assert verdict.dispatched
    assert verdict.refusal is not None
    assert verdict.refusal.reason is Reason.QUEUE_TIMEOUT
    callers[0].leave.set()
    await settle()
    assert isinstance(callers[1].task.exception(), RefusedError)
    assert_empty(node)


async def test_block_end_evicts_the_queue_and_refuses_the_next() -> None:
    node, clocks = node_with(pledge())
    running, queued = Caller(node, Verdict(pledge())), Caller(node, late := Verdict(pledge()))
    await settle()
    assert node.standing(pledge()) is None
    clocks.advance(7 * 3600 + 2)
    assert node.standing(pledge()) is Reason.OUTSIDE_BLOCK
    await settle()
    assert late.refusal is not None
    assert late.refusal.reason is Reason.OUTSIDE_BLOCK
    assert isinstance(queued.task.exception(), RefusedError)
    assert not running.task.done()
    running.leave.set()
    clocks.advance(16 * 3600)
    assert node.standing(pledge()) is None, "its block has come again"


async def test_clock_set_back_over_a_border_is_followed() -> None:
    node, clocks = node_with(pledge())
    clocks.wall = MIDNIGHT + 9 * 3600
    assert node.standing(pledge()) is Reason.OUTSIDE_BLOCK
    clocks.wall = MIDNIGHT + 7 * 3600
    assert node.standing(pledge()) is None


async def test_pledge_ends_with_its_validity() -> None:
    until = datetime.datetime.fromtimestamp(MIDNIGHT + 3700, datetime.UTC)
    node, clocks = node_with(ending := pledge(valid_until=until))
    assert node.standing(ending) is None
    clocks.advance(100)
    assert node.standing(ending) is Reason.SUSPENDED


async def test_removed_pledge_is_revoked_and_forgotten_once_there_are_too_many(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("serving.node.KEPT_REVOKED_SEATS", 0)
    node, _ = node_with(pledge("a"), pledge("b"), slots=1)
    running, queued = Caller(node, Verdict(pledge("a"))), Caller(node, late := Verdict(pledge("a")))
    await settle()
    node.apply(snapshot(pledge("b"), revision=2))
    await settle()
    assert late.refusal is not None
    assert late.refusal.reason is Reason.REVOKED
    assert isinstance(queued.task.exception(), RefusedError)
    assert node.admission.knows("a"), "it still runs"
    running.leave.set()
    await settle()
    node.apply(snapshot(pledge("b"), revision=3))
    assert not node.admission.knows("a")
    with pytest.raises(RefusedError):
        async with node.enter(Verdict(pledge("a")), ASK):
            pass


async def test_pledge_that_comes_back_is_served_again_with_its_counters() -> None:
    node, _ = node_with(pledge("a"))
    async with node.enter(Verdict(pledge("a")), ASK):
        pass
    node.apply(snapshot(revision=2))
    assert node.standing(pledge("a")) is Reason.REVOKED
    node.apply(snapshot(pledge("a"), revision=3))
    assert node.standing(pledge("a")) is None
    assert node.admission.read("a", node.clock()).requests["dispatched"] == 1


async def test_siblings_that_hit_each_others_blocks_are_refunded_nothing() -> None:
    node, _ = node_with(pledge(), slots=4)
    caller = Caller(node, Verdict(pledge()), Ask(1000, 1, count=2))
    await settle()
    assert caller.ticket_id is not None
    node.record_step([StepOutput(caller.ticket_id, 1, 0), StepOutput(caller.ticket_id, 1, 992)], [])
    charged = node.admission.read("a", 0.0).virtual_time
    assert charged >= 1000
    node.record_step([StepOutput(caller.ticket_id, 1, 992)], [caller.ticket_id])
    assert node.admission.read("a", 0.0).virtual_time >= charged
    caller.leave.set()


async def test_more_prompts_than_counted_is_a_bug_that_raises() -> None:
    node, _ = node_with(pledge())
    verdict = Verdict(pledge())
    async with node.enter(verdict, ASK):
        with pytest.raises(RuntimeError, match="with more"):
            async with node.enter(verdict, ASK):
                pass


async def test_drain_gives_the_queue_back_and_lets_the_running_finish() -> None:
    node, _ = node_with(pledge())
    running, queued = Caller(node, Verdict(pledge())), Caller(node, late := Verdict(pledge()))
    await settle()
    node.drain()
    await settle()
    assert late.refusal is not None
    assert late.refusal.reason is Reason.DRAINING
    assert isinstance(queued.task.exception(), RefusedError)
    assert not running.task.done()
    assert node.standing(pledge()) is Reason.DRAINING
    running.leave.set()
    await settle()
    assert_empty(node)


async def test_more_seats_apply_to_what_is_queued() -> None:
    node, _ = node_with(pledge(), pledge("b"), slots=3)
    others = [Caller(node, Verdict(pledge("b"))) for _ in range(3)]
    await settle()
    first, second = Caller(node, Verdict(pledge())), Caller(node, Verdict(pledge()))
    await settle()
    assert first.ticket_id is not None, "owed"
    assert second.ticket_id is None, "borrowed, and all slots are taken"
    node.apply(snapshot(pledge(quantity=2), pledge("b"), revision=2))
    await settle()
    assert second.ticket_id is not None
    for caller in (first, second, *others):
        caller.leave.set()


async def test_random_callers_leave_nothing_behind() -> None:
    import random

    random_ = random.Random(7)
    node, clocks = node_with(pledge("a"), pledge("b"), slots=3, policy=Policy(queue_timeout_s=3))
    callers: list[Caller] = []
    for _ in range(400):
        name = random_.choice("ab")
        verdict = Verdict(pledge(name), prompts=(prompts := random_.choice([1, 1, 2])))
        ask = replace(ASK, count=random_.choice([1, 1, 2]))
        callers += [Caller(node, verdict, ask) for _ in range(prompts)]
        await asyncio.sleep(0)
        victim = random_.choice(callers)
        match random_.randrange(4):
            case 0:
                victim.task.cancel()
            case 1:
                victim.leave.set()
            case 2 if victim.ticket_id is not None:
                node.record_step(
                    [StepOutput(victim.ticket_id, 1, 0)], random_.choice([[], [victim.ticket_id]])
                )
            case _:
                clocks.advance(random_.random())
                node._tell_evicted(node.admission.expire(clocks.now))
    for caller in callers:
        caller.leave.set()
    for _ in range(200):
        await asyncio.sleep(0)
        clocks.advance(0.1)
        node._tell_evicted(node.admission.expire(clocks.now))
    assert all(caller.task.done() for caller in callers)
    for caller in callers:
        if not caller.task.cancelled():
            assert isinstance(caller.task.exception(), RefusedError | None)
    assert_empty(node)
