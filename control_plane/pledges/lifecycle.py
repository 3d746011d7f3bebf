"""What happens by itself: pools go live, months are charged, holds expire, refunds are made.

`tick` looks at the database and does whatever is due by the injected clock. It keeps nothing between
calls but pauses for what has just failed: cut off anywhere, or run twice at once, the next tick
goes on from what the rows say.
"""

from __future__ import annotations

import asyncio
import datetime
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import TypeVar

from sqlalchemy import ColumnElement, Select, delete, exists, or_, select
from sqlalchemy.ext.asyncio import AsyncSession

from control_plane.accounts.tables import IdempotentCall
from control_plane.billing.gateway import GatewayUnavailable
from control_plane.billing.tables import Charge, ChargeState, Purpose
from control_plane.capacity.judgement import in_order
from control_plane.capacity.service import Alarm, activation_problem, alarms, bundle_of, changes
from control_plane.context import ControlPlane
from control_plane.nodes.service import choose_node, ready_nodes
from control_plane.pledges import transitions
from control_plane.pledges.settlement import new_charge, settle
from control_plane.pledges.tables import SUBSCRIBED_STATES, Pledge, PledgeState
from control_plane.pools import service as pools
from control_plane.pools.tables import Pool, PoolState
from control_plane.routing import KEPT
from control_plane.throughput.tables import ThroughputMinute

log = logging.getLogger("boosts.lifecycle")
Item = TypeVar("Item")

TICK_S = 0.5
HANDLER_TIME = datetime.timedelta(seconds=30)
"""Charges of a hold are left to the request that made them for this long."""
HOLD_TIME = datetime.timedelta(minutes=15)
"""A hold that could not be paid by then, because the gateway was away, ends."""
MINUTES_KEPT = datetime.timedelta(days=92)
"""Throughput by minute: the last quarter."""
ACTIVATION_PATIENCE = datetime.timedelta(hours=1)
"""A pool whose pledges are paid waits this long for nodes that honour them, and then gives the money back."""
_LOOK_EVERY = datetime.timedelta(seconds=10)
"""For alarms."""
_GATEWAY_REST = datetime.timedelta(seconds=5)
_CHARGE_REST = datetime.timedelta(minutes=1)
_AT_ONCE = 8
"""Charges under way at the same time."""
_BATCH = 500
"""Rows taken up by one step of one tick."""


class Lifecycle:
    """Does what is due; see the module."""

    def __init__(self, context: ControlPlane) -> None:
        self._context = context
        self._gateway_rests_until: datetime.datetime | None = None
        self._charges_rest_until: dict[str, datetime.datetime] = {}
        self._looked_at: datetime.datetime | None = None
        self._alarms: dict[str, list[Alarm]] = {}

    async def run(self) -> None:
        """Tick until canceled. A tick that fails is logged, and the next one tries again."""
        while True:
            try:
                await self.tick()
            except Exception:
                log.exception("a lifecycle tick failed; the next one goes on from what is stored")
            await asyncio.sleep(TICK_S)

    async def tick(self) -> None:
        """Do everything that is due now. Raises what failed, after everything else was done."""
        steps: tuple[Callable[[], Awaitable[None]], ...] = (
            self._expire_holds,
            self._cross_thresholds,
            self._charge_first_months,
            self._begin_renewals,
            self._settle_charges,
            self._decide_activations,
            self._place_pledges,
            self._sound_alarms,
            self._forget,
        )
        await _each(steps, lambda step: step())

    # ---- holds -------------------------------------------------------------------------------------------

    async def _expire_holds(self) -> None:
        expired = self._now() - HOLD_TIME
        condition = (Pledge.state == PledgeState.HELD) & (Pledge.created_at <= expired)

        async def expire(session: AsyncSession, pool: Pool, pledge: Pledge) -> None:
            await transitions.give_fee_back(session, pledge)
            await transitions.cancel(session, pool, pledge, "hold_expired", self._now())

        await self._each_pledge(condition, expire)

    # ---- going live --------------------------------------------------------------------------------------

    async def _cross_thresholds(self) -> None:
        """funding -> activating, where enough seats are pledged: the nodes load the model. And back, where
        too many withdrew before anybody was charged."""

        async def cross(pool_id: str) -> None:
            async with self._context.database.read() as session:
                if not await _crossed_threshold(session, await session.get_one(Pool, pool_id)):
                    return
            async with self._context.database.write() as session:
                pool = await pools.lock(session, pool_id)
                if not await _crossed_threshold(session, pool):
                    return
                if pool.state is PoolState.FUNDING:
                    pool.state = PoolState.ACTIVATING
                    pool.activation += 1
                else:
                    pool.state = PoolState.FUNDING
                pools.touch(pool)
                log.info("pool %s is %s", pool.slug, pool.state.value)

        await _each(await self._pools(PoolState.FUNDING, PoolState.ACTIVATING), cross)

    async def _charge_first_months(self) -> None:
        """Of all pledges of a pool whose nodes are ready, and of late ones of a pool that is live."""

        async def begin_charging(pool_id: str) -> None:
            async with self._context.database.read() as session:
                if not await session.scalar(select(exists(_uncharged(pool_id)))):
                    return
            async with self._context.database.write() as session:
                pool = await pools.lock(session, pool_id)
                if not await self._may_charge(session, pool):
                    return
                pledges = await session.scalars(_uncharged(pool_id).limit(_BATCH))
                session.add_all(
                    new_charge(pledge, Purpose.FIRST_MONTH, self._now(), pool.activation)
                    for pledge in pledges
                )

        await _each(await self._pools(PoolState.ACTIVATING, PoolState.ACTIVE), begin_charging)

    async def _may_charge(self, session: AsyncSession, pool: Pool) -> bool:
        """Nobody pays for seats that no node would serve now, or that its nodes have not proven to honour."""
        if pool.state is PoolState.ACTIVATING:
            return await activation_problem(session, pool, self._now()) is None
        return pool.state is PoolState.ACTIVE and bool(await ready_nodes(session, pool, self._now()))

    async def _decide_activations(self) -> None:
        """activating -> active or back to funding, once every pledge has been charged.

        A node may have been lost meanwhile, or have become slower: then the pool waits for one that honours
        what was paid, for an hour, and after that the money goes back.
        """

        async def decide(pool_id: str) -> None:
            async with self._context.database.write() as session:
                pool = await pools.lock(session, pool_id)
                if pool.state is PoolState.ACTIVATING and await _is_all_charged(session, pool):
                    await self._decide(session, pool)

        await _each(await self._pools(PoolState.ACTIVATING), decide)

    async def _decide(self, session: AsyncSession, pool: Pool) -> None:
        now = self._now()
        charges = list(
            await session.scalars(
                select(Charge)
                .join(Pledge)
                .where(
                    Pledge.pool_id == pool.id,
                    Pledge.state == PledgeState.PLEDGED,
                    Charge.purpose == Purpose.FIRST_MONTH,
                    Charge.activation == pool.activation,
                )
            )
        )
        paid: list[tuple[Pledge, Charge]] = []
        for charge in charges:
            pledge = await session.get_one(Pledge, charge.pledge_id)
            if charge.state is ChargeState.PAID:
                paid.append((pledge, charge))
            else:
                await transitions.cancel(session, pool, pledge, "card_declined", now)
        seats = sum(pledge.seats for pledge, _ in paid)
        enough = seats >= pool.min_seats
        problem = await activation_problem(session, pool, now, [pledge for pledge, _ in paid])
        if enough and problem is not None and now - _first_paid(paid) < ACTIVATION_PATIENCE:
            return
        if enough and problem is None:
            pool.state = PoolState.ACTIVE
            # As it was judged: each choice of a node depends on those before it.
            for pledge, _ in sorted(paid, key=lambda pair: in_order(bundle_of(pair[0]))):
                await transitions.activate(session, self._context.vault, pool, pledge, now)
        else:
            pool.state = PoolState.FUNDING
            for _, charge in paid:
                charge.state = ChargeState.REFUNDING
        pools.touch(pool)
        log.info(
            "pool %s: %d of %d pledges paid, %d of %d seats: %s",
            *(pool.slug, len(paid), len(charges), seats, pool.min_seats, pool.state.value),
        )

    # ---- every month -------------------------------------------------------------------------------------

    async def _begin_renewals(self) -> None:
        """Charge, or end, the pledges whose paid month is over. In a paused pool no month is over."""
        now = self._now()
        live = select(Pool.id).where(Pool.state == PoolState.ACTIVE)
        charging = select(Charge.id).where(Charge.pledge_id == Pledge.id, Charge.state == ChargeState.PENDING)
        due = (Pledge.state == PledgeState.ACTIVE) & (Pledge.current_period_end <= now)
        again = (Pledge.state == PledgeState.PAST_DUE) & (Pledge.retry_now | (Pledge.next_attempt_at <= now))
        condition = or_(due, again) & Pledge.pool_id.in_(live) & ~exists(charging)

        async def begin(session: AsyncSession, pool: Pool, pledge: Pledge) -> None:
            if pool.state is not PoolState.ACTIVE:
                return
            if pledge.cancel_at_period_end:
                await transitions.cancel(session, pool, pledge, "subscription_ended", now)
            else:
                pledge.retry_now = False
                session.add(new_charge(pledge, Purpose.RENEWAL, now))

        await self._each_pledge(condition, begin)

    # ---- money -------------------------------------------------------------------------------------------

    async def _settle_charges(self) -> None:
        now = self._now()
        if self._gateway_rests_until is not None and now < self._gateway_rests_until:
            return
        left_to_handlers = (Pledge.state == PledgeState.HELD) & (Charge.created_at > now - HANDLER_TIME)
        resting = self._charges_rest_until = {
            charge_id: until for charge_id, until in self._charges_rest_until.items() if until > now
        }
        paused = Pledge.pool_id.in_(select(Pool.id).where(Pool.state == PoolState.PAUSED))
        async with self._context.database.read() as session:
            charge_ids = list(
                await session.scalars(
                    select(Charge.id)
                    .join(Pledge)
                    .where(
                        Charge.id.not_in(list(resting)),
                        or_(
                            Charge.state == ChargeState.REFUNDING,
                            (Charge.state == ChargeState.PENDING) & ~left_to_handlers & ~paused,
                        ),
                    )
                    .order_by(Charge.created_at, Charge.id)
                    .limit(_BATCH)
                )
            )
        slots = asyncio.Semaphore(_AT_ONCE)

        async def settle_one(charge_id: str) -> None:
            async with slots:
                await settle(self._context, charge_id)

        results = await asyncio.gather(*map(settle_one, charge_ids), return_exceptions=True)
        for charge_id, result in zip(charge_ids, results, strict=True):
            if isinstance(result, GatewayUnavailable):
                self._gateway_rests_until = now + _GATEWAY_REST
                log.warning("the payment gateway does not answer; charge %s waits: %s", charge_id, result)
            elif isinstance(result, BaseException):
                # One charge that cannot be settled must not keep the others from it.
                self._charges_rest_until[charge_id] = now + _CHARGE_REST
                log.error(
                    "charge %s could not be settled; tried again in a minute", charge_id, exc_info=result
                )

    # ---- nodes, housekeeping -----------------------------------------------------------------------------

    async def _place_pledges(self) -> None:
        """Give pledges a node that were activated when there was none."""
        condition = Pledge.state.in_(SUBSCRIBED_STATES) & Pledge.node_id.is_(None)

        async def place(session: AsyncSession, pool: Pool, pledge: Pledge) -> None:
            blocks = pledge.reserved_blocks
            if await choose_node(session, pool, blocks, self._now(), pledge.quantity) is not None:
                await transitions.place(session, pool, pledge, self._now())
                pools.touch(pool)

        await self._each_pledge(condition, place)

    async def _sound_alarms(self) -> None:
        """Log what keeps a pool from going live and what is wrong with a live one, as it begins and ends."""
        now = self._now()
        if self._looked_at is not None and now - self._looked_at < _LOOK_EVERY:
            return
        self._looked_at = now

        async def look(pool_id: str) -> None:
            async with self._context.database.read() as session:
                pool = await session.get_one(Pool, pool_id)
                current = await alarms(session, pool, now)
                if pool.state is PoolState.ACTIVATING:
                    problem = await activation_problem(session, pool, now)
                    current = [] if problem is None else [Alarm(problem.code, problem.message)]
            begun, over = changes(self._alarms.get(pool_id, []), current)
            for alarm in begun:
                log.warning("alarm: pool %s: %s: %s", pool.slug, alarm.code, alarm.message)
            for alarm in over:
                log.info("alarm over: pool %s: %s: %s", pool.slug, alarm.code, alarm.message)
            self._alarms[pool_id] = current

        await _each(await self._pools(*PoolState), look)

    async def _forget(self) -> None:
        """What has been kept for as long as it was promised."""
        now = self._now()
        for table, old in (
            (IdempotentCall, IdempotentCall.started_at < now - KEPT),
            (ThroughputMinute, ThroughputMinute.minute < now - MINUTES_KEPT),
        ):
            async with self._context.database.read() as session:
                if not await session.scalar(select(exists(select(table).where(old)))):
                    continue
            async with self._context.database.write() as session:
                await session.execute(delete(table).where(old))

    # ---- how ---------------------------------------------------------------------------------------------

    def _now(self) -> datetime.datetime:
        return self._context.clock()

    async def _pools(self, *states: PoolState) -> Sequence[str]:
        async with self._context.database.read() as session:
            return list(await session.scalars(select(Pool.id).where(Pool.state.in_(states))))

    async def _each_pledge(
        self,
        condition: ColumnElement[bool],
        change: Callable[[AsyncSession, Pool, Pledge], Awaitable[None]],
    ) -> None:
        """Apply `change` to each pledge that meets `condition`, in a transaction that holds its pool."""
        async with self._context.database.read() as session:
            found = list(
                await session.execute(select(Pledge.id, Pledge.pool_id).where(condition).limit(_BATCH))
            )

        async def change_one(ids: tuple[str, str]) -> None:
            pledge_id, pool_id = ids
            async with self._context.database.write() as session:
                pool = await pools.lock(session, pool_id)
                # Looked up again under the lock: it may have changed since.
                pledge = await session.scalar(select(Pledge).where(Pledge.id == pledge_id, condition))
                if pledge is not None:
                    await change(session, pool, pledge)

        await _each([(pledge_id, pool_id) for pledge_id, pool_id in found], change_one)


async def _each(items: Iterable[Item], action: Callable[[Item], Awaitable[None]]) -> None:
    """Do it for every item, whatever happens with the others; then raise what happened."""
    failures: list[Exception] = []
    for item in items:
        try:
            await action(item)
        except Exception as failure:
            failures.append(failure)
    if failures:
        raise ExceptionGroup("some of what was due", failures)


async def _crossed_threshold(session: AsyncSession, pool: Pool) -> bool:
    enough = await _pledged_seats(session, pool) >= pool.min_seats
    if pool.state is PoolState.FUNDING:
        return enough
    return pool.state is PoolState.ACTIVATING and not enough and not await _has_begun_charging(session, pool)


async def _pledged_seats(session: AsyncSession, pool: Pool) -> int:
    pledges = await session.scalars(
        select(Pledge).where(Pledge.pool_id == pool.id, Pledge.state == PledgeState.PLEDGED)
    )
    return sum(pledge.seats for pledge in pledges)


def _uncharged(pool_id: str) -> Select[tuple[Pledge]]:
    """Pledges of the pool that wait for it to go live and have no charge of its current attempt."""
    charged = select(Charge.id).where(
        Charge.pledge_id == Pledge.id,
        Charge.purpose == Purpose.FIRST_MONTH,
        Charge.activation == select(Pool.activation).where(Pool.id == pool_id).scalar_subquery(),
    )
    return select(Pledge).where(
        Pledge.pool_id == pool_id, Pledge.state == PledgeState.PLEDGED, ~exists(charged)
    )


async def _has_begun_charging(session: AsyncSession, pool: Pool) -> bool:
    charges = (
        select(Charge.id)
        .join(Pledge)
        .where(
            Pledge.pool_id == pool.id,
            Charge.purpose == Purpose.FIRST_MONTH,
            Charge.activation == pool.activation,
        )
    )
    return bool(await session.scalar(select(exists(charges))))


def _first_paid(paid: Sequence[tuple[Pledge, Charge]]) -> datetime.datetime:
    settled = [charge.settled_at for _, charge in paid if charge.settled_at is not None]
    assert settled, "a pool needs a seat at least to go live"
    return min(settled)


async def _is_all_charged(session: AsyncSession, pool: Pool) -> bool:
    unsettled = (
        select(Charge.id)
        .join(Pledge)
        .where(
            Pledge.pool_id == pool.id,
            Charge.purpose == Purpose.FIRST_MONTH,
            Charge.state == ChargeState.PENDING,
        )
    )
    left = await session.scalar(select(or_(exists(unsettled), exists(_uncharged(pool.id)))))
    return not left and await _has_begun_charging(session, pool)
