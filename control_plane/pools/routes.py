"""The pools API for customers: what there is to buy."""

from __future__ import annotations

from fastapi import APIRouter
from sqlalchemy import select

from control_plane.auth import Caller
from control_plane.context import Context
from control_plane.envelope import Success, documented
from control_plane.pledges.tables import Pledge
from control_plane.pools import service
from control_plane.pools.models import PoolDetail, PoolSummary
from control_plane.pools.tables import Pool, PoolState, Reservation, Seat
from control_plane.text import Reference

router = APIRouter(prefix="/api/pools", tags=["pools"])


@router.get("", responses=documented(401))
async def list_pools(context: Context, caller: Caller) -> Success[list[PoolSummary]]:
    """All pools but drafts, oldest first."""
    async with context.database.read() as session:
        pools = list(
            await session.scalars(
                select(Pool).where(Pool.state != PoolState.DRAFT).order_by(Pool.created_at, Pool.id)
            )
        )
        reserved = await service.reserved_seats(session, [pool.id for pool in pools])
        return Success(
            data=[
                PoolSummary.of(pool, await service.blocks_of(session, pool.id), reserved.get(pool.id, 0))
                for pool in pools
            ]
        )


@router.get("/{id_or_slug}", responses=documented(401, 404))
async def read_pool(context: Context, caller: Caller, id_or_slug: Reference) -> Success[PoolDetail]:
    """One pool with every hour of every seat."""
    async with context.database.read() as session:
        pool = await service.find(session, id_or_slug)
        seats = await session.execute(
            select(Seat, Pledge.state)
            .outerjoin(Reservation, (Reservation.seat_id == Seat.id) & Reservation.released_at.is_(None))
            .outerjoin(Pledge, Pledge.id == Reservation.pledge_id)
            .where(Seat.pool_id == pool.id)
        )
        blocks = await service.blocks_of(session, pool.id)
        return Success(data=PoolDetail.with_slots(pool, blocks, [(seat, state) for seat, state in seats]))
