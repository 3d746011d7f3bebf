"""What an operator sees of the guarantee: the whole pool by minute, and each pledge."""

from __future__ import annotations

from fastapi import APIRouter
from sqlalchemy import select

from control_plane.auth import Operator
from control_plane.context import Context
from control_plane.envelope import Shown, Success, documented
from control_plane.pledges.tables import SUBSCRIBED_STATES, Pledge
from control_plane.pools import service as pools
from control_plane.text import Text
from control_plane.throughput import service
from control_plane.throughput.routes import Minutes, Throughput, ThroughputOfMinute, shown_tokens
from control_plane.throughput.service import Sums

router = APIRouter(prefix="/api/admin/pools", tags=["operator"])


class ThroughputOfPledge(Throughput):
    """One pledge over the whole time."""

    pledge_id: str
    account_id: str
    node_id: str | None
    status: str
    quantity: int
    """Seats in each of its blocks."""
    seats: int
    """Over all its blocks."""
    shortfall_tokens: float
    """Owed, and not delivered by the end of the busy period that owed them."""

    @classmethod
    def by(cls, pledge: Pledge, sums: Sums) -> ThroughputOfPledge:
        return cls(
            pledge_id=pledge.id,
            account_id=pledge.account_id,
            node_id=pledge.node_id,
            status=pledge.state.value,
            quantity=pledge.quantity,
            seats=pledge.quantity * len(pledge.blocks),
            shortfall_tokens=shown_tokens(sums.amounts.shortfall_tokens),
            **Throughput.of(sums).model_dump(),
        )


class PoolThroughput(Shown):
    """A pool's recent minutes."""

    pool_id: str
    guarantee_tok_s: float
    """Output tokens per second guaranteed to each seat."""
    minutes: list[ThroughputOfMinute]
    """All pledges together, for minutes with any activity, oldest first."""
    pledges: list[ThroughputOfPledge]
    """All minutes together, for pledges that are subscribed or were active in this time, oldest first."""
    totals: Throughput


@router.get("/{id_or_slug}/throughput", responses=documented(401, 403, 404, 422))
async def read_pool_throughput(
    context: Context, operator: Operator, id_or_slug: Text, minutes: Minutes = 60
) -> Success[PoolThroughput]:
    """What the pool's pledges were owed and got."""
    since = service.window_start(minutes, context.clock())
    async with context.database.read() as session:
        pool = await pools.find(session, id_or_slug, drafts=True)
        by_minute = await service.by_minute(session, pool.id, since)
        by_pledge = await service.by_pledge(session, pool.id, since)
        pledges = await session.scalars(
            select(Pledge).where(Pledge.pool_id == pool.id).order_by(Pledge.created_at, Pledge.id)
        )
        return Success(
            data=PoolThroughput(
                pool_id=pool.id,
                guarantee_tok_s=pool.guarantee_tok_s,
                minutes=[ThroughputOfMinute.at(minute, sums) for minute, sums in by_minute.items()],
                pledges=[
                    ThroughputOfPledge.by(pledge, by_pledge.get(pledge.id, Sums()))
                    for pledge in pledges
                    if pledge.id in by_pledge or pledge.state in SUBSCRIBED_STATES
                ],
                totals=Throughput.of(sum(by_minute.values(), Sums())),
            )
        )
