"""The operator's side of nodes: tokens to join with, the list, draining."""

from __future__ import annotations

import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Query
from pydantic import Field
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from contract.capacity import NodeCapacity
from control_plane.auth import Operator
from control_plane.capacity.judgement import Placed, judged_by_measurement, measured
from control_plane.capacity.service import lowest_attainment_by_node
from control_plane.clock import iso
from control_plane.context import Context
from control_plane.envelope import Shown, Success, documented
from control_plane.nodes import service
from control_plane.nodes.service import Load, NodeState
from control_plane.nodes.tables import Node
from control_plane.pools import service as pools
from control_plane.pools.tables import Pool
from control_plane.routing import IdempotentRoute
from control_plane.text import Text

router = APIRouter(prefix="/api/admin", tags=["operator"], route_class=IdempotentRoute)


class NewJoinToken(Shown):
    join_token: str
    """Shown this once; lets one node join."""
    expires_at: str
    pool_slug: str


class ShownGpu(Shown):
    """One GPU, from the node's last heartbeat."""

    name: str
    memory_used_bytes: int
    memory_total_bytes: int
    utilization_percent: int | None
    """Null where it is not measured, like the two below."""
    power_watts: float | None
    temperature_celsius: int | None


class ShownNode(Shown):
    """A node: its place, its standing, and what its last heartbeat said."""

    id: str
    name: str
    pool_id: str
    pool_slug: str
    base_url: str | None
    """Where customers reach it; null until its agent has registered."""
    state: NodeState
    ready: bool
    """Heard within 40 s, serving the pool's model, and not draining."""
    last_heartbeat_at: str | None
    revision: int
    """Of the orders that it follows; lower than `poolRevision` while it lags behind."""
    pool_revision: int
    restarts: int
    """Of serving after an unwanted end, since the agent started."""
    spooled_reports: int
    """Throughput reports that the node has yet to send."""
    clock_offset_ms: float | None
    """The node's clock minus ours."""
    gpus: list[ShownGpu]
    problem: str | None
    """Why it is not ready."""
    pledges: int
    """Active and past-due pledges that live on it."""
    seats: int
    """That they have reserved, over all blocks."""
    guarantee_tok_s: float
    """Of each seat of its pool."""
    capacity: NodeCapacity | None
    """What the node has measured of itself; null until it has."""
    capacity_at: str | None
    """When it last told us."""
    most_seats: int | None
    """Of one block, that it honours by this measurement; null where nothing is guaranteed or measured."""
    busiest_block_seats: int
    """Those that it has to honour at once."""
    attainment_60s: Annotated[float, Field(ge=0, le=1)] | None = Field(alias="attainment60s")
    """The lowest of its pledges in the last minute or two; null where nothing was owed."""

    @classmethod
    def of(
        cls, node: Node, pool: Pool, load: Load, attainment: float | None, now: datetime.datetime
    ) -> ShownNode:
        placed = Placed.of(load.pledges)
        judged = None
        if measured(node, pool) is not None:
            judged = judged_by_measurement(node, pool, placed.busiest)
        return cls(
            id=node.id,
            name=node.name,
            pool_id=pool.id,
            pool_slug=pool.slug,
            base_url=node.base_url,
            state=service.state(node, now),
            ready=service.is_ready(node, pool, now),
            last_heartbeat_at=None if node.heard_at is None else iso(node.heard_at),
            revision=node.revision,
            pool_revision=pool.revision,
            restarts=node.restarts,
            spooled_reports=node.spooled_reports,
            clock_offset_ms=node.clock_offset_ms,
            gpus=[ShownGpu(**gpu) for gpu in node.gpus],
            problem=node.problem,
            pledges=len(load.pledges),
            seats=load.seats,
            guarantee_tok_s=pool.guarantee_tok_s,
            capacity=None if node.capacity is None else NodeCapacity.model_validate(node.capacity),
            capacity_at=None if node.capacity_at is None else iso(node.capacity_at),
            most_seats=None if judged is None else judged.most_seats,
            busiest_block_seats=placed.busiest,
            attainment_60s=attainment,
        )


@router.post("/pools/{id_or_slug}/join-tokens", responses=documented(401, 403, 404, 409, 422))
async def create_join_token(context: Context, operator: Operator, id_or_slug: Text) -> Success[NewJoinToken]:
    """Make a token with which one node can join the pool within 24 hours."""
    async with context.database.write() as session:
        pool = await pools.find(session, id_or_slug, drafts=True)
        token, expires_at = await service.new_join_token(session, pool, context.clock())
    return Success(data=NewJoinToken(join_token=token, expires_at=iso(expires_at), pool_slug=pool.slug))


@router.get("/nodes", responses=documented(401, 403, 404, 422))
async def list_nodes(
    context: Context,
    operator: Operator,
    pool: Annotated[Text | None, Query(description="Id or slug: only this pool's")] = None,
) -> Success[list[ShownNode]]:
    """All nodes, oldest first."""
    async with context.database.read() as session:
        if pool is None:
            return Success(data=await _shown(session, context.clock()))
        found = await pools.find(session, pool, drafts=True)
        return Success(data=await _shown(session, context.clock(), Node.pool_id == found.id))


@router.post("/nodes/{node_id}/drain", responses=documented(401, 403, 404, 409, 422))
async def drain_node(context: Context, operator: Operator, node_id: Text) -> Success[ShownNode]:
    """Have the node finish its running requests and stop; new pledges go to others."""
    return await _set_draining(context, node_id, True)


@router.post("/nodes/{node_id}/undrain", responses=documented(401, 403, 404, 409, 422))
async def undrain_node(context: Context, operator: Operator, node_id: Text) -> Success[ShownNode]:
    """Let the node serve again."""
    return await _set_draining(context, node_id, False)


@router.post("/nodes/{node_id}/retire", responses=documented(401, 403, 404, 409))
async def retire_node(context: Context, operator: Operator, node_id: Text) -> Success[ShownNode]:
    """Give up a node that will not come back; its pledges move to other nodes of the pool."""
    async with context.database.write() as session:
        await service.retire(session, node_id)
        [node] = await _shown(session, context.clock(), Node.id == node_id)
        return Success(data=node)


async def _set_draining(context: Context, node_id: str, draining: bool) -> Success[ShownNode]:
    async with context.database.write() as session:
        await service.set_draining(session, node_id, draining)
        [node] = await _shown(session, context.clock(), Node.id == node_id)
        return Success(data=node)


async def _shown(session: AsyncSession, now: datetime.datetime, *conditions: Any) -> list[ShownNode]:
    """The nodes of which the conditions hold."""
    loads = await service.reserved(session)
    attainments = await lowest_attainment_by_node(session, now)
    rows = await session.execute(
        select(Node, Pool)
        .join(Pool, Pool.id == Node.pool_id)
        .where(*conditions)
        .order_by(Node.created_at, Node.id)
    )
    return [
        ShownNode.of(node, pool, loads.get(node.id, Load()), attainments.get(node.id), now)
        for node, pool in rows
    ]
