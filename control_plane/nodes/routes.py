"""The agent API: what `contract.nodes` describes, served under `/internal`.

Bodies are parsed by the contract's own models, so that both sides keep to one text; what they allow
and a database cannot keep (NUL characters, numbers beyond 64 bits) is refused here.
"""

from __future__ import annotations

import asyncio
import datetime
import logging
from collections.abc import Iterable
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Query, Request, Response
from sqlalchemy import select
from starlette.requests import ClientDisconnect

from contract.documents import Document
from contract.errors import ContractError
from contract.nodes import (
    MAX_WAIT_S,
    Acknowledged,
    Enrolled,
    Enrolment,
    Heartbeat,
    Orders,
    Registered,
    Registration,
    ReportBatch,
    ReportsStored,
)
from control_plane.auth import CallingNode
from control_plane.context import Context, ControlPlane
from control_plane.envelope import ApiError, Success, documented
from control_plane.nodes import orders, service
from control_plane.nodes.tables import Node
from control_plane.pools.tables import Pool
from control_plane.throughput import service as throughput

router = APIRouter(prefix="/internal", tags=["agents"])
_log = logging.getLogger(__name__)

MAX_NUMBER = throughput.MAX_COUNT
LOOK_EVERY_S = 0.25
"""How often a held request looks for a new revision: so long a new pledge may wait for its node."""
_EARLIEST = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
_LATEST = datetime.datetime(2200, 1, 1, tzinfo=datetime.UTC)

Body = TypeVar("Body", bound=Document)


# --- bodies --------------------------------------------------------------------------------------


def _takes(model: type[Document]) -> dict[str, Any]:
    """For a route's `openapi_extra`: its body is this document, its parts spelled out in place."""
    schema = model.model_json_schema()
    parts = schema.pop("$defs", {})

    def inlined(piece: Any) -> Any:
        if isinstance(piece, list):
            return [inlined(item) for item in piece]
        if not isinstance(piece, dict):
            return piece
        if "$ref" in piece:
            return inlined(parts[piece["$ref"].removeprefix("#/$defs/")])
        return {name: inlined(value) for name, value in piece.items()}

    return {"requestBody": {"required": True, "content": {"application/json": {"schema": inlined(schema)}}}}


async def _read(request: Request, model: type[Body]) -> Body:
    """The request's body. Raises ApiError 400, 422."""
    try:
        body = await request.body()
    except ClientDisconnect:
        raise ApiError(400, "bad_request", "The body ended before it was complete.") from None
    try:
        document = model.parse(body, "body")
    except ContractError as error:
        raise ApiError(422, "invalid_request", str(error)) from None
    if (fault := _unstorable(document)) is not None:
        *path, reason = fault
        raise ApiError(422, "invalid_request", f"body: {'.'.join(path)}: {reason}")
    return document


def _unstorable(value: object) -> tuple[str, ...] | None:
    """What in `value` no database keeps: the path to it, then the reason; None when all is well."""
    match value:
        case Document():
            return _unstorable_part(value)
        case tuple():
            return _unstorable_part(enumerate(value))
        case str() if "\x00" in value:
            return ("must not contain NUL characters",)
        case int() | float() if abs(value) > MAX_NUMBER:
            return (f"must not be beyond {MAX_NUMBER:,}",)
        case datetime.datetime() if not _EARLIEST <= value < _LATEST:
            return ("must be a time from 1970 to 2199",)
    return None


def _unstorable_part(parts: Iterable[tuple[object, object]]) -> tuple[str, ...] | None:
    for name, part in parts:
        if (fault := _unstorable(part)) is not None:
            return (str(name), *fault)
    return None


# --- calls ---------------------------------------------------------------------------------------


@router.post("/enrol", openapi_extra=_takes(Enrolment), responses=documented(401, 422))
async def enrol(request: Request, context: Context) -> Success[Enrolled]:
    """Make a node of whoever holds a join token. The node token is in this answer and nowhere else."""
    enrolment = await _read(request, Enrolment)
    async with context.database.write() as session:
        enrolled = await service.enrol(session, enrolment, context.clock())
    return Success(data=enrolled)


@router.post("/register", openapi_extra=_takes(Registration), responses=documented(401, 422))
async def register(request: Request, context: Context, caller: CallingNode) -> Success[Registered]:
    """Give a started agent its epoch; an agent of an older epoch is refused from now on."""
    registration = await _read(request, Registration)
    async with context.database.write() as session:
        epoch = await service.register(session, caller.id, registration)
    return Success(data=Registered(epoch=epoch, at=context.clock()))


@router.post("/heartbeat", openapi_extra=_takes(Heartbeat), responses=documented(401, 409, 422))
async def heartbeat(request: Request, context: Context, caller: CallingNode) -> Success[Acknowledged]:
    """Take note of the node's state."""
    beat = await _read(request, Heartbeat)
    async with context.database.write() as session:
        await service.hear(session, caller.id, beat, context.clock())
    return Success(data=Acknowledged(at=context.clock()))


@router.post("/reports", openapi_extra=_takes(ReportBatch), responses=documented(401, 409, 422))
async def store_reports(request: Request, context: Context, caller: CallingNode) -> Success[ReportsStored]:
    """Store throughput reports; one that was stored before changes nothing."""
    batch = await _read(request, ReportBatch)
    async with context.database.write() as session:
        node = await service.lock_current(session, caller.id, batch.epoch)
        stored, duplicates = await throughput.store(session, node, batch, context.clock())
    return Success(data=ReportsStored(stored=stored, duplicates=duplicates))


@router.get(
    "/orders",
    response_model=Success[Orders],
    responses={204: {"description": "Nothing is newer, after the wait"}, **documented(401, 409, 422)},
)
async def read_orders(
    request: Request,
    context: Context,
    caller: CallingNode,
    epoch: Annotated[int, Query(ge=1, le=MAX_NUMBER)],
    store_id: Annotated[str, Query(description="Of the orders that the node has; empty for none")] = "",
    revision: Annotated[int, Query(ge=0, le=MAX_NUMBER, description="Of those orders; 0 for none")] = 0,
    wait_s: Annotated[
        float,
        Query(ge=0, allow_inf_nan=False, description=f"How long to wait; at most {MAX_WAIT_S:.0f} s count"),
    ] = 0.0,
) -> Success[Orders] | Response:
    """The node's orders once there are newer ones than it has; 204 if none come in time.

    Looks into the database rather than waiting for a signal within this process, so that a change made
    by another control plane process counts as well. A node whose revision is higher than ours, of the
    same store, was ordered by a database that has since gone back in time: it refuses what we have, so
    it gets 204, and the log says so.
    """
    async with context.database.read() as session:
        known = revision if store_id == await orders.store_id(session) else 0
    # How long a connection is held is no matter of the control plane's clock, which a test may stop.
    deadline = asyncio.get_running_loop().time() + min(wait_s, MAX_WAIT_S)
    warned = False
    while True:
        current = await _revision(context, caller, epoch)
        if current > known:
            return Success(data=await _orders(context, caller))
        if current < known and not warned:
            _log.warning(
                "node %s (%s) follows revision %d of pool %s, which is only at %d: was the database "
                "restored from a copy? The node keeps its orders until the pool has passed that revision",
                caller.id,
                caller.name,
                known,
                caller.pool_id,
                current,
            )
            warned = True
        left_s = deadline - asyncio.get_running_loop().time()
        if left_s <= 0 or not await _stays(request, min(left_s, LOOK_EVERY_S)):
            return Response(status_code=204)


async def _revision(context: ControlPlane, caller: Node, epoch: int) -> int:
    """The pool's revision now. Raises ApiError 409 when the caller has been replaced."""
    query = select(Pool.revision, Node.epoch).join(Node, Node.pool_id == Pool.id).where(Node.id == caller.id)
    async with context.database.read() as session:
        revision, current_epoch = (await session.execute(query)).one()
    service.check_epoch(epoch, current_epoch)
    return int(revision)


async def _orders(context: ControlPlane, caller: Node) -> Orders:
    async with context.database.read() as session:
        return await orders.build(session, await session.get_one(Pool, caller.pool_id), caller)


async def _stays(request: Request, seconds: float) -> bool:
    """Wait; False as soon as this server stops, or when the caller has gone."""
    stopping: asyncio.Event = request.app.state.stopping
    try:
        async with asyncio.timeout(seconds):
            await stopping.wait()
    except TimeoutError:
        return not await request.is_disconnected()
    return False
