"""Capacity as the database has it: what keeps a pool from going live, and the alarms of a live one."""

from __future__ import annotations

import datetime
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import ColumnElement, func, select
from sqlalchemy.ext.asyncio import AsyncSession

from control_plane.capacity.judgement import (
    Bundle,
    Placed,
    Problem,
    figures,
    is_promised,
    judged_by_measurement,
    left_on,
    measured,
    placing_problem,
)
from control_plane.envelope import ApiError
from control_plane.nodes import service as nodes
from control_plane.nodes.tables import Node
from control_plane.pledges.tables import OPEN_STATES, Pledge, PledgeState
from control_plane.pools.tables import Pool, PoolState
from control_plane.throughput.tables import ThroughputMinute

MISSED_BELOW = 0.95
"""Attainment over 60 s below this is an alarm."""
_RECENT = datetime.timedelta(minutes=1)
"""How old a minute of throughput may be that speaks of now: the running one, and the one before it."""


@dataclass(frozen=True, slots=True)
class Alarm:
    """Something that an operator should look at now."""

    code: str
    message: str
    node_id: str | None = None
    pledge_id: str | None = None
    details: dict[str, Any] = field(default_factory=dict)


def bundle_of(pledge: Pledge) -> Bundle:
    return pledge.quantity, frozenset(pledge.reserved_blocks)


async def activation_problem(
    session: AsyncSession, pool: Pool, now: datetime.datetime, pledges: Collection[Pledge] | None = None
) -> Problem | None:
    """Why the pool cannot go live with these pledges, or with all that wait for it; None when it can."""
    if pledges is None:
        waiting = (Pledge.pool_id == pool.id, Pledge.state == PledgeState.PLEDGED)
        pledges = list(await session.scalars(select(Pledge).where(*waiting)))
    ready = await nodes.ready_nodes(session, pool, now)
    return placing_problem(pool, ready, [bundle_of(pledge) for pledge in pledges])


async def require_room(session: AsyncSession, pool: Pool, order: Bundle, now: datetime.datetime) -> None:
    """Before seats of a live pool are sold: one of its nodes is ready and honours them.

    Raises ApiError 503 `pool_unavailable`, 409 `sold_out`. The pool's row must be locked.
    """
    ready = await nodes.ready_nodes(session, pool, now)
    if not ready:
        raise ApiError(
            503,
            "pool_unavailable",
            "None of this pool's nodes is ready, so it sells nothing now; nothing was reserved or charged.",
            headers={"retry-after": "30"},
        )
    if not is_promised(pool):
        return
    loads = await nodes.reserved(session, pool.id)
    # Seats that are sold and have no node yet may end up on any.
    unplaced = await session.scalars(
        select(Pledge).where(
            Pledge.pool_id == pool.id, Pledge.node_id.is_(None), Pledge.state.in_(OPEN_STATES)
        )
    )
    coming = [bundle_of(pledge) for pledge in unplaced]
    left = [
        left_on(node, pool, Placed.of([*loads.get(node.id, nodes.Load()).pledges, *coming]), order)
        for node in ready
    ]
    best = max(left, key=lambda by_block: min(by_block.values()))
    short = [(block, int(seats)) for block, seats in best.items() if seats < order[0]]
    if short:
        named = ", ".join(f"{block.value} ({seats} left)" for block, seats in short)
        raise ApiError(
            409,
            "sold_out",
            f"The pool's nodes cannot honour so many seats more in: {named}. Nothing was reserved.",
            {"blocks": [{"block": b.value, "requested": order[0], "available": n} for b, n in short]},
        )


# --- alarms ----------------------------------------------------------------------------------------


async def alarms(session: AsyncSession, pool: Pool, now: datetime.datetime) -> list[Alarm]:
    """What is wrong with a live pool; nothing in other states."""
    if pool.state is not PoolState.ACTIVE:
        return []
    loads = await nodes.reserved(session, pool.id)
    found: list[Alarm] = []
    for node in await nodes.of_pool(session, pool):
        load = loads.get(node.id)
        if load is not None:
            found += _node_alarms(pool, node, load, now)
    missed = await lowest_attainment(session, pool.id, now)
    found += [
        Alarm(
            "guarantee_missed",
            f"Pledge {pledge_id} got {attainment:.1%} of what it was owed in 60 s.",
            pledge_id=pledge_id,
            details={"attainment60s": attainment},
        )
        for pledge_id, attainment in sorted(missed.items())
        if attainment < MISSED_BELOW
    ]
    return found


def _node_alarms(pool: Pool, node: Node, load: nodes.Load, now: datetime.datetime) -> list[Alarm]:
    """Of a node that has pledges."""
    called = f"Node {node.id} ({node.name}), on which {len(load.pledges)} pledges live,"
    found = []
    if not nodes.is_ready(node, pool, now):
        state = nodes.state(node, now).value
        found.append(Alarm("node_lost", f"{called} is not ready: {state}.", node.id))
    if not is_promised(pool):
        return found
    if measured(node, pool) is None:
        message = f"{called} has not told what it can do: nothing proves the guarantee."
        return [*found, Alarm("capacity_unmeasured", message, node.id)]
    judged = judged_by_measurement(node, pool, Placed.of(load.pledges).busiest)
    if not judged.fits:
        message = f"{called} does not honour its seats any more: {judged}."
        found.append(Alarm("below_capacity", message, node.id, details=figures(judged)))
    return found


async def lowest_attainment(session: AsyncSession, pool_id: str, now: datetime.datetime) -> dict[str, float]:
    """By pledge, the lowest attainment over 60 s of the last one to two minutes, where anything was owed."""
    return await _lowest(session, Pledge.id, now, Pledge.pool_id == pool_id)


async def lowest_attainment_by_node(session: AsyncSession, now: datetime.datetime) -> dict[str, float]:
    """The same, by the node on which the pledges live."""
    return await _lowest(session, Pledge.node_id, now, Pledge.node_id.is_not(None))


async def _lowest(
    session: AsyncSession, key: Any, now: datetime.datetime, where: ColumnElement[bool]
) -> dict[str, float]:
    since = now.replace(second=0, microsecond=0) - _RECENT
    rows = await session.execute(
        select(key, func.min(ThroughputMinute.attainment_60s))
        .join(Pledge, Pledge.id == ThroughputMinute.pledge_id)
        .where(where, ThroughputMinute.minute >= since, ThroughputMinute.attainment_60s.is_not(None))
        .group_by(key)
    )
    return dict(rows.tuples().all())


def changes(before: Sequence[Alarm], after: Sequence[Alarm]) -> tuple[list[Alarm], list[Alarm]]:
    """The alarms that have begun, and those that are over: one is the same whatever its figures."""

    def same(alarm: Alarm) -> tuple[str, str | None, str | None]:
        return alarm.code, alarm.node_id, alarm.pledge_id

    known, now = {same(alarm) for alarm in before}, {same(alarm) for alarm in after}
    begun = [alarm for alarm in after if same(alarm) not in known]
    return begun, [alarm for alarm in before if same(alarm) not in now]
