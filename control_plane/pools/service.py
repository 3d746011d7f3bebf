"""Pools: finding, making, opening, pausing; and the arithmetic of seats."""

from __future__ import annotations

import datetime
from collections.abc import Collection, Sequence

from sqlalchemy import delete, func, or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from contract.blocks import Block
from control_plane.capacity.judgement import require_declared
from control_plane.database import new_id
from control_plane.envelope import ApiError
from control_plane.pledges.tables import SUBSCRIBED_STATES, Pledge
from control_plane.pools.models import PoolTerms
from control_plane.pools.tables import Pool, PoolBlock, PoolState, Reservation, Seat


def not_found() -> ApiError:
    return ApiError(404, "pool_not_found", "There is no pool with this id or slug.")


async def find(session: AsyncSession, id_or_slug: str, *, drafts: bool = False) -> Pool:
    """The pool. Raises ApiError 404; a draft is found by operators only."""
    pool = await session.scalar(select(Pool).where(or_(Pool.id == id_or_slug, Pool.slug == id_or_slug)))
    if pool is None or (pool.state is PoolState.DRAFT and not drafts):
        raise not_found()
    return pool


async def lock(session: AsyncSession, pool_id: str) -> Pool:
    """The pool's row, held until the transaction ends.

    Whoever changes a pool, its reservations or its pledges' states holds this one row first: with
    a single lock per pool there is no order to get wrong, and no deadlock.
    """
    pool = await session.scalar(
        select(Pool).where(Pool.id == pool_id).with_for_update().execution_options(populate_existing=True)
    )
    assert pool is not None, "pools are never deleted"
    return pool


def touch(pool: Pool) -> None:
    """Give the pool a new revision: its nodes fetch new orders. The row must be locked."""
    pool.revision += 1


async def blocks_of(session: AsyncSession, pool_id: str) -> list[PoolBlock]:
    """The blocks that the pool sells, in the day's order."""
    rows = await session.scalars(select(PoolBlock).where(PoolBlock.pool_id == pool_id))
    return sorted(rows, key=lambda row: row.block.first_hour)


async def reserved_seats(session: AsyncSession, pool_ids: Sequence[str]) -> dict[str, int]:
    """Seats taken, held ones included, by pool."""
    counts = await session.execute(
        select(Seat.pool_id, func.count())
        .join(Reservation, Reservation.seat_id == Seat.id)
        .where(Seat.pool_id.in_(pool_ids), Reservation.released_at.is_(None))
        .group_by(Seat.pool_id)
    )
    return dict(counts.tuples().all())


async def free_seats(session: AsyncSession, pool_id: str, block: Block, limit: int) -> list[Seat]:
    """At most `limit` seats of the block that are free, lowest index first. The pool must be locked."""
    taken = select(Reservation.id).where(Reservation.seat_id == Seat.id, Reservation.released_at.is_(None))
    rows = await session.scalars(
        select(Seat)
        .where(Seat.pool_id == pool_id, Seat.block == block, ~taken.exists())
        .order_by(Seat.slot_index)
        .limit(limit)
    )
    return list(rows)


async def release_seats(session: AsyncSession, pledge_id: str, now: datetime.datetime) -> None:
    """Give the pledge's seats back. The pool must be locked."""
    await session.execute(
        update(Reservation)
        .where(Reservation.pledge_id == pledge_id, Reservation.released_at.is_(None))
        .values(released_at=now)
    )


async def create(session: AsyncSession, terms: PoolTerms, now: datetime.datetime) -> Pool:
    """A draft. Raises ApiError 409 for a slug that is taken."""
    pool = Pool(id=new_id(), state=PoolState.DRAFT, created_at=now)
    session.add(pool)
    await _set_terms(session, pool, terms)
    return pool


async def edit(session: AsyncSession, pool: Pool, terms: PoolTerms, changed: Collection[str]) -> None:
    """Replace a draft's terms; of an open pool only vLLM's flags. Raises ApiError 409 for others."""
    if pool.state is not PoolState.DRAFT and set(changed) <= {"engineArgs"}:
        pool.engine_flags = terms.engine_flags
        touch(pool)
        return
    _require_state(pool, PoolState.DRAFT, "be edited, but for its engineArgs: what was offered stays")
    await session.execute(delete(PoolBlock).where(PoolBlock.pool_id == pool.id))
    await _set_terms(session, pool, terms)
    touch(pool)


async def open_for_pledges(session: AsyncSession, pool: Pool) -> None:
    """draft -> funding: from here on its seats are a fixed inventory.

    Raises ApiError 409 when the declared capacity does not honour them.
    """
    _require_state(pool, PoolState.DRAFT, "be opened")
    blocks = await blocks_of(session, pool.id)
    require_declared(pool, blocks)
    for row in blocks:
        session.add_all(
            Seat(pool_id=pool.id, block=row.block, slot_index=index) for index in range(row.seats)
        )
    pool.state = PoolState.FUNDING
    touch(pool)


def pause(pool: Pool, now: datetime.datetime) -> None:
    """active -> paused: keys answer 503, nothing is charged, nothing is sold."""
    _require_state(pool, PoolState.ACTIVE, "be paused")
    pool.state = PoolState.PAUSED
    pool.paused_at = now
    touch(pool)


async def resume(session: AsyncSession, pool: Pool, now: datetime.datetime) -> None:
    """paused -> active. Every period ends later by the time of it that was paused, also one that was not
    paid when the pause began: it is overdue by as much as it was then."""
    _require_state(pool, PoolState.PAUSED, "be resumed")
    assert pool.paused_at is not None
    subscribed = await session.scalars(
        select(Pledge).where(Pledge.pool_id == pool.id, Pledge.state.in_(SUBSCRIBED_STATES))
    )
    for pledge in subscribed:
        assert pledge.activated_at is not None
        assert pledge.current_period_end is not None
        paused = now - max(pool.paused_at, pledge.activated_at)
        pledge.current_period_end += paused
        if pledge.next_attempt_at is not None:
            pledge.next_attempt_at += paused
        # Later months are counted from the new end, or the first of them would be short.
        pledge.billing_anchor = pledge.current_period_end
        pledge.periods = 0
    pool.state = PoolState.ACTIVE
    pool.paused_at = None
    touch(pool)


def _require_state(pool: Pool, state: PoolState, what: str) -> None:
    if pool.state is not state:
        raise ApiError(
            409,
            "wrong_pool_status",
            f"Only a pool that is {state.value} can {what}; this one is {pool.state.value}.",
            {"status": pool.state.value},
        )


async def _set_terms(session: AsyncSession, pool: Pool, terms: PoolTerms) -> None:
    pool.slug = terms.slug
    pool.model_id = terms.model_id
    pool.model_name = terms.model_name
    pool.description = terms.description
    pool.infra_spec = terms.infra_spec
    pool.min_seats = terms.min_seats
    pool.guarantee_tok_s = terms.guarantee_tok_s
    pool.prefill_tok_s = terms.prefill_tok_s
    pool.rpm_limit = terms.rpm_limit
    pool.tpm_limit = terms.tpm_limit
    pool.engine_flags = terms.engine_flags
    pool.nodes = terms.nodes
    pool.context_tokens = terms.context_tokens
    pool.capacity_margin = terms.capacity_margin
    declared = terms.declared_capacity
    pool.declared_capacity = None if declared is None else declared.model_dump(mode="json")
    session.add_all(
        PoolBlock(pool_id=pool.id, block=block, seats=offer.seats, price_cents=offer.price_cents)
        for block, offer in terms.blocks.items()
    )
    try:
        await session.flush()
    except IntegrityError:
        raise ApiError(409, "slug_taken", f"Another pool has the slug {terms.slug!r}.") from None
