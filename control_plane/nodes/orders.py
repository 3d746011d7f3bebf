"""Orders: the whole of what one node shall do, made from the database as it is now."""

from __future__ import annotations

import datetime

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from contract.blocks import Block
from contract.entitlements import (
    BlockTime,
    Entitlements,
    PledgeEntitlement,
    PledgeStatus,
    PoolStatus,
    PoolTerms,
)
from contract.nodes import Orders
from control_plane.keys.tables import BoostKey
from control_plane.nodes.tables import Node, Store
from control_plane.pledges.tables import SUBSCRIBED_STATES, Pledge
from control_plane.pools.tables import Pool, PoolState

HONOURED_AFTER_PERIOD = datetime.timedelta(hours=72)
"""How long a pledge goes on without news from us: a control plane that is away ends nobody's service."""

_STATUS = {
    # Before the money is in nobody has a key yet: to a node these are one.
    PoolState.DRAFT: PoolStatus.ACTIVATING,
    PoolState.FUNDING: PoolStatus.ACTIVATING,
    PoolState.ACTIVATING: PoolStatus.ACTIVATING,
    PoolState.ACTIVE: PoolStatus.ACTIVE,
    PoolState.PAUSED: PoolStatus.PAUSED,
}
SERVING_STATES = frozenset({PoolState.ACTIVATING, PoolState.ACTIVE, PoolState.PAUSED})
"""Of a pool: its nodes run their engines. In a paused one they are kept warm."""


async def store_id(session: AsyncSession) -> str:
    """Which database this is: revisions compare only within one. There is exactly one row."""
    return (await session.scalars(select(Store.id))).one()


async def build(session: AsyncSession, pool: Pool, node: Node) -> Orders:
    """The node's orders, numbered with the pool's revision.

    Of `pool` the row as it was read counts, its revision with it; everything else is read here, later.
    A change in between then makes the content newer than its number, and the node, told of the higher
    revision, fetches it once more. The other way round it would keep an old state under a new number.
    """
    draining = (await session.scalars(select(Node.draining).where(Node.id == node.id))).one()
    return Orders(
        version=1,
        serve=pool.state in SERVING_STATES and not draining,
        model_id=pool.model_id,
        engine_flags=tuple(pool.engine_flags),
        entitlements=Entitlements(
            version=1,
            store_id=await store_id(session),
            revision=pool.revision,
            pool=PoolTerms(
                slug=pool.slug,
                status=_STATUS[pool.state],
                guarantee_tok_s=pool.guarantee_tok_s,
                prefill_tok_s=pool.prefill_tok_s,
            ),
            pledges=await _pledges(session, pool, node),
        ),
    )


async def _pledges(session: AsyncSession, pool: Pool, node: Node) -> tuple[PledgeEntitlement, ...]:
    rows = await session.execute(
        select(Pledge, BoostKey.key_sha256)
        .join(BoostKey, BoostKey.pledge_id == Pledge.id)
        .where(Pledge.node_id == node.id, Pledge.state.in_(SUBSCRIBED_STATES))
        .order_by(Pledge.created_at, Pledge.id)
    )
    return tuple(_entitlement(pledge, key_sha256, pool) for pledge, key_sha256 in rows)


def _entitlement(pledge: Pledge, key_sha256: str, pool: Pool) -> PledgeEntitlement:
    assert pledge.current_period_end is not None, "subscribed pledges have a paid period"
    return PledgeEntitlement(
        pledge_id=pledge.id,
        key_sha256=key_sha256,
        status=PledgeStatus(pledge.state.value),
        quantity=pledge.quantity,
        rpm_limit=pool.rpm_limit * pledge.quantity,
        tpm_limit=pool.tpm_limit * pledge.quantity,
        blocks=tuple(BlockTime.of(Block(block)) for block in pledge.blocks),
        valid_until=pledge.current_period_end + HONOURED_AFTER_PERIOD,
    )
