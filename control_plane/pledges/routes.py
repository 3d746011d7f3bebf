"""The pools API for customers: subscribe, look at one's pledge and key, withdraw."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter
from pydantic import AfterValidator, Field
from sqlalchemy.ext.asyncio import AsyncSession

from contract.blocks import Block
from control_plane.auth import Caller
from control_plane.clock import iso
from control_plane.context import Context, ControlPlane
from control_plane.envelope import ApiError, Shown, Success, documented
from control_plane.keys import service as keys
from control_plane.money import HOURS, show
from control_plane.nodes.tables import Node
from control_plane.pledges import service
from control_plane.pledges.tables import Pledge, PledgeState
from control_plane.pools import service as pools
from control_plane.pools.models import hour_slots
from control_plane.pools.tables import Pool
from control_plane.routing import IdempotentRoute
from control_plane.text import Reference

router = APIRouter(prefix="/api/pools/{id_or_slug}", tags=["pools"], route_class=IdempotentRoute)

MAX_QUANTITY = 20


def _unique(blocks: list[Block]) -> list[Block]:
    if len(set(blocks)) < len(blocks):
        raise ValueError("each block may be named once")
    return blocks


class Subscription(Shown):
    """What to reserve."""

    blocks: Annotated[list[Block], Field(min_length=1, max_length=len(Block)), AfterValidator(_unique)]
    quantity: Annotated[int, Field(ge=1, le=MAX_QUANTITY, strict=True)] = 1
    """Seats in each of the blocks."""


class ShownKey(Shown):
    """The inference key of a pledge."""

    id: str
    api_key: str
    rpm_limit: int
    """Requests per minute over the pledge's whole quantity, like tpmLimit."""
    tpm_limit: int
    is_active: bool
    """False while the pledge is past due."""
    base_url: str | None
    """The node that serves the key; null until there is one."""


class Reserved(Shown):
    """Answer to a subscription."""

    id: str
    pool_id: str
    status: str
    monthly_price: str
    slot_count: int
    """Hour slots: 8 for each seat of each block."""
    key: ShownKey | None = None
    """Left out until the pool is live."""


class ShownHour(Shown):
    hour: int
    slot_index: int
    price_per_day: str


class ShownPledge(Shown):
    id: str
    status: str
    monthly_price: str
    current_period_end: str | None
    """Null until the pool is live."""
    hours: list[ShownHour]
    key: ShownKey | None
    """Null until the pool is live."""


class Withdrawn(Shown):
    canceled: bool


@router.post("/subscribe", responses=documented(401, 402, 404, 409, 503), response_model_exclude_unset=True)
async def subscribe(
    context: Context, caller: Caller, id_or_slug: Reference, body: Subscription
) -> Success[Reserved]:
    """Reserve seats. The fee of $1.00 is charged to the card on file, in a live pool the first month too."""
    blocks = tuple(block for block in Block if block in body.blocks)
    pledge = await service.subscribe(context, caller, id_or_slug, service.Order(blocks, body.quantity))
    async with context.database.read() as session:
        pool = await pools.find(session, id_or_slug)
        key = await _key(session, context, pool, pledge)
        reserved = Reserved(
            id=pledge.id,
            pool_id=pool.id,
            status=pledge.state.value,
            monthly_price=show(pledge.price_cents),
            slot_count=HOURS * pledge.seats,
            **({} if key is None else {"key": key}),
        )
        return Success(success=True, data=reserved)


@router.get("/my-pledge", responses=documented(401, 404))
async def my_pledge(context: Context, caller: Caller, id_or_slug: Reference) -> Success[ShownPledge]:
    """The caller's pledge in this pool, until it ends."""
    async with context.database.read() as session:
        pool = await pools.find(session, id_or_slug)
        pledge = await service.find_shown(session, caller, pool)
        hours = [
            ShownHour(hour=slot.hour, slot_index=slot.slot_index, price_per_day=slot.price_per_day)
            for seat, price in await service.seats_of(session, pledge)
            for slot in hour_slots(seat, price, pledge.state.value)
        ]
        end = pledge.current_period_end
        return Success(
            data=ShownPledge(
                id=pledge.id,
                status=pledge.state.value,
                monthly_price=show(pledge.price_cents),
                current_period_end=None if end is None else iso(end),
                hours=hours,
                key=await _key(session, context, pool, pledge),
            )
        )


@router.get("/my-key", responses=documented(401, 404))
async def my_key(context: Context, caller: Caller, id_or_slug: Reference) -> Success[ShownKey]:
    """The key alone; 404 until the pool is live."""
    async with context.database.read() as session:
        pool = await pools.find(session, id_or_slug)
        pledge = await service.find_shown(session, caller, pool)
        key = await _key(session, context, pool, pledge)
    if key is None:
        raise ApiError(404, "key_not_found", "Your key is made when the pool goes live.")
    return Success(data=key)


@router.delete("/pledge", responses=documented(401, 404, 409))
async def withdraw(context: Context, caller: Caller, id_or_slug: Reference) -> Success[Withdrawn]:
    """Cancel a pledge that is not active yet; its seats are free again, the fee is not refunded."""
    await service.withdraw(context, caller, id_or_slug)
    return Success(data=Withdrawn(canceled=True))


async def _key(session: AsyncSession, context: ControlPlane, pool: Pool, pledge: Pledge) -> ShownKey | None:
    found = await keys.of_pledge(session, context.vault, pledge.id)
    if found is None:
        return None
    key_id, text = found
    node = None if pledge.node_id is None else await session.get(Node, pledge.node_id)
    return ShownKey(
        id=key_id,
        api_key=text,
        rpm_limit=pool.rpm_limit * pledge.quantity,
        tpm_limit=pool.tpm_limit * pledge.quantity,
        is_active=pledge.state is PledgeState.ACTIVE,
        base_url=None if node is None else node.base_url,
    )
