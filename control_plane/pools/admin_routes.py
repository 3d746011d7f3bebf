"""The operator's side of pools: make, edit, open, pause, resume."""

from __future__ import annotations

import datetime
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Body
from fastapi.exceptions import RequestValidationError
from pydantic import Field, ValidationError
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from contract.capacity import NodeCapacity
from control_plane.auth import Operator
from control_plane.capacity import judgement
from control_plane.capacity import service as capacity
from control_plane.context import Context
from control_plane.envelope import Shown, Success, documented
from control_plane.money import show
from control_plane.pools import service
from control_plane.pools.models import PoolTerms
from control_plane.pools.tables import Pool, PoolBlock, PoolState
from control_plane.routing import IdempotentRoute
from control_plane.text import Reference

router = APIRouter(prefix="/api/admin/pools", tags=["operator"], route_class=IdempotentRoute)


class OfferedBlock(Shown):
    seats: int
    monthly_price: str


class ShownFeasibility(Shown):
    """Whether one node honours so many seats of one block at once, and the figures that decide it."""

    seats: int
    fits: bool
    fails: list[str]
    """The bounds that are broken: slots, kv_tokens, step_time, step_tokens."""
    most_seats: int | None
    """That would fit; null where nothing is guaranteed."""
    slots: int
    step_needed_ms: float
    step_allowed_ms: float | None
    """The pace less the margin; less than that where a step cannot take all prompts that come in it."""
    prefill_tokens_per_step: float
    """Prompt tokens that the seats' limits allow, in the time of one step, as far as a step can take them."""
    kv_tokens_needed: int
    kv_tokens: int


class ShownProblem(Shown):
    """Why a pool does not go live yet."""

    code: str
    """no_ready_node, capacity_unmeasured or not_feasible."""
    message: str
    details: dict[str, Any]


class ShownAlarm(Shown):
    """Something to look at now."""

    code: str
    """node_lost, below_capacity, capacity_unmeasured or guarantee_missed."""
    message: str
    node_id: str | None
    pledge_id: str | None
    details: dict[str, Any]


class Standing(Shown):
    """What a pool can honour, and whether it does."""

    feasibility: ShownFeasibility | None
    """Of the fullest block's seats, its share for one node, by the declared capacity; null without one."""
    activation_problem: ShownProblem | None
    """While the pool is activating: what it waits for. Nobody is charged meanwhile."""
    alarms: list[ShownAlarm]
    attainment_60s: Annotated[float, Field(ge=0, le=1)] | None = Field(alias="attainment60s")
    """The lowest of all its pledges in the last minute or two; null where nothing was owed."""

    @classmethod
    async def now(
        cls, session: AsyncSession, pool: Pool, blocks: list[PoolBlock], now: datetime.datetime
    ) -> Standing:
        declared = judgement.declared(pool, blocks)
        problem = None
        if pool.state is PoolState.ACTIVATING:
            problem = await capacity.activation_problem(session, pool, now)
        attainments = await capacity.lowest_attainment(session, pool.id, now)
        return cls(
            feasibility=None if declared is None else ShownFeasibility(**judgement.figures(declared[1])),
            activation_problem=None if problem is None else ShownProblem(**asdict(problem)),
            alarms=[ShownAlarm(**asdict(alarm)) for alarm in await capacity.alarms(session, pool, now)],
            attainment_60s=min(attainments.values(), default=None),
        )


class AdminPool(Standing):
    """A pool as its operator sees it."""

    id: str
    status: str
    slug: str
    model_id: str
    model_name: str
    description: str
    infra_spec: str
    blocks: dict[str, OfferedBlock]
    min_seats: int
    guarantee_tok_s: float
    prefill_tok_s: float
    rpm_limit: int
    tpm_limit: int
    engine_args: list[str]
    nodes: int
    declared_capacity: NodeCapacity | None
    context_tokens: int
    capacity_margin: float
    pledged_slots: int
    revision: int

    @classmethod
    async def read(
        cls, session: AsyncSession, pool: Pool, reserved: int, now: datetime.datetime
    ) -> AdminPool:
        blocks = await service.blocks_of(session, pool.id)
        standing = await Standing.now(session, pool, blocks, now)
        return cls(
            id=pool.id,
            status=pool.state.value,
            **_terms(pool, blocks),
            pledged_slots=reserved,
            revision=pool.revision,
            **{name: getattr(standing, name) for name in Standing.model_fields},
        )


def _terms(pool: Pool, blocks: list[PoolBlock]) -> dict[str, Any]:
    return {
        "slug": pool.slug,
        "model_id": pool.model_id,
        "model_name": pool.model_name,
        "description": pool.description,
        "infra_spec": pool.infra_spec,
        "blocks": {
            row.block.value: {"seats": row.seats, "monthly_price": show(row.price_cents)} for row in blocks
        },
        "min_seats": pool.min_seats,
        "guarantee_tok_s": pool.guarantee_tok_s,
        "prefill_tok_s": pool.prefill_tok_s,
        "rpm_limit": pool.rpm_limit,
        "tpm_limit": pool.tpm_limit,
        "engine_args": pool.engine_flags,
        "nodes": pool.nodes,
        "declared_capacity": pool.declared_capacity,
        "context_tokens": pool.context_tokens,
        "capacity_margin": pool.capacity_margin,
    }


async def _shown(context: Context, id_or_slug: str) -> Success[AdminPool]:
    async with context.database.read() as session:
        pool = await service.find(session, id_or_slug, drafts=True)
        reserved = await service.reserved_seats(session, [pool.id])
        pledged = reserved.get(pool.id, 0)
        return Success(data=await AdminPool.read(session, pool, pledged, context.clock()))


@router.get("", responses=documented(401, 403))
async def list_pools(context: Context, operator: Operator) -> Success[list[AdminPool]]:
    """All pools, drafts too, oldest first."""
    async with context.database.read() as session:
        pools = list(await session.scalars(select(Pool).order_by(Pool.created_at, Pool.id)))
        reserved = await service.reserved_seats(session, [pool.id for pool in pools])
        return Success(
            data=[
                await AdminPool.read(session, pool, reserved.get(pool.id, 0), context.clock())
                for pool in pools
            ]
        )


@router.get("/{id_or_slug}", responses=documented(401, 403, 404))
async def read_pool(context: Context, operator: Operator, id_or_slug: Reference) -> Success[AdminPool]:
    """One pool, a draft too."""
    return await _shown(context, id_or_slug)


@router.post("", responses=documented(401, 403, 409))
async def create_pool(context: Context, operator: Operator, terms: PoolTerms) -> Success[AdminPool]:
    """Make a draft, which only operators see."""
    async with context.database.write() as session:
        pool = await service.create(session, terms, context.clock())
    return await _shown(context, pool.id)


@router.patch("/{id_or_slug}", responses=documented(401, 403, 404, 409))
async def edit_pool(
    context: Context,
    operator: Operator,
    id_or_slug: Reference,
    changes: Annotated[dict[str, Any], Body(description="Fields of a new pool; those left out stay.")],
) -> Success[AdminPool]:
    """Change a draft; of an open pool its engineArgs, for which its nodes load the model anew."""
    async with context.database.write() as session:
        pool = await service.find(session, id_or_slug, drafts=True)
        pool = await service.lock(session, pool.id)
        blocks = await service.blocks_of(session, pool.id)
        # Whole again before it is checked: rules that span fields hold for a change as for a new pool.
        current = PoolTerms.model_validate(_terms(pool, blocks)).model_dump(mode="json", by_alias=True)
        try:
            terms = PoolTerms.model_validate({**current, **changes}, by_name=False)
        except ValidationError as error:
            raise RequestValidationError(error.errors(include_url=False, include_context=False)) from None
        await service.edit(session, pool, terms, changes)
    return await _shown(context, pool.id)


@router.post("/{id_or_slug}/open", responses=documented(401, 403, 404, 409))
async def open_pool(context: Context, operator: Operator, id_or_slug: Reference) -> Success[AdminPool]:
    """Let customers see the pool and pledge, if the declared capacity honours its seats."""
    async with context.database.write() as session:
        pool = await service.find(session, id_or_slug, drafts=True)
        await service.open_for_pledges(session, await service.lock(session, pool.id))
    return await _shown(context, pool.id)


@router.post("/{id_or_slug}/pause", responses=documented(401, 403, 404, 409))
async def pause_pool(context: Context, operator: Operator, id_or_slug: Reference) -> Success[AdminPool]:
    """Stop selling, charging and serving; paid time stands still."""
    async with context.database.write() as session:
        pool = await service.find(session, id_or_slug, drafts=True)
        service.pause(await service.lock(session, pool.id), context.clock())
    return await _shown(context, pool.id)


@router.post("/{id_or_slug}/resume", responses=documented(401, 403, 404, 409))
async def resume_pool(context: Context, operator: Operator, id_or_slug: Reference) -> Success[AdminPool]:
    """Go on where the pool was paused."""
    async with context.database.write() as session:
        pool = await service.find(session, id_or_slug, drafts=True)
        await service.resume(session, await service.lock(session, pool.id), context.clock())
    return await _shown(context, pool.id)
