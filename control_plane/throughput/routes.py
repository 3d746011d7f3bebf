"""What a customer sees of the guarantee: owed and delivered, minute by minute."""

from __future__ import annotations

import datetime
from dataclasses import asdict
from typing import Annotated

from fastapi import APIRouter, Query
from pydantic import Field
from sqlalchemy import select

from control_plane.auth import Caller
from control_plane.clock import iso
from control_plane.context import Context
from control_plane.envelope import ApiError, Shown, Success, documented
from control_plane.pledges.tables import SHOWN_STATES, Pledge
from control_plane.pools import service as pools
from control_plane.text import Text
from control_plane.throughput import service
from control_plane.throughput.service import Sums

router = APIRouter(prefix="/api/pools", tags=["pools"])

Minutes = Annotated[
    int, Query(ge=1, le=1440, description="How far back, in minutes; the running one is the last")
]

Window = Annotated[float, Field(ge=0, le=1)] | None


class Throughput(Shown):
    """What was owed and delivered over some time."""

    owed_tokens: float
    """Output tokens that the guarantee promised."""
    delivered_tokens: int
    """Output tokens that the engine produced, more than was owed included."""
    attainment: Annotated[float, Field(ge=0, le=1)] | None
    """Delivered over owed, at most 1 in each minute; null where nothing was owed."""
    input_tokens: int
    requests: int
    """That entered the engine; refused ones do not count."""
    borrowed_tokens: float
    """Of the delivered ones, those beyond what was owed."""
    held_s: float
    """Seconds for which requests were held between steps, each by itself."""
    owed_seconds: int
    """Whole seconds throughout which something was owed."""
    missed_seconds: int
    """Of these, those in which less than 95 % of it was delivered."""
    attainment_1s: Window = Field(alias="attainment1s")
    """The worst second; null where nothing was owed for a whole one."""
    attainment_10s: Window = Field(alias="attainment10s")
    """The lowest of windows of 10 s, as sampled about every 10 s; null where nothing was owed."""
    attainment_60s: Window = Field(alias="attainment60s")
    """The same, of windows of 60 s."""

    @classmethod
    def of(cls, sums: Sums) -> Throughput:
        return cls(
            owed_tokens=shown_tokens(sums.amounts.owed_tokens),
            delivered_tokens=sums.amounts.output_tokens,
            attainment=sums.attainment,
            input_tokens=sums.amounts.input_tokens,
            requests=sums.amounts.requests,
            borrowed_tokens=shown_tokens(sums.amounts.borrowed_tokens),
            held_s=round(sums.amounts.held_s, 3),
            owed_seconds=sums.amounts.owed_seconds,
            missed_seconds=sums.amounts.missed_seconds,
            **asdict(sums.windows),
        )


class ThroughputOfMinute(Throughput):
    """One minute."""

    minute: str
    """Its start, UTC."""

    @classmethod
    def at(cls, minute: datetime.datetime, sums: Sums) -> ThroughputOfMinute:
        return cls(minute=iso(minute), **Throughput.of(sums).model_dump())


class MyThroughput(Shown):
    """One pledge's recent minutes."""

    pool_id: str
    pledge_id: str
    guarantee_tok_s: float
    """Output tokens per second guaranteed to each seat."""
    quantity: int
    """Seats in each of its blocks."""
    minutes: list[ThroughputOfMinute]
    """Those with any activity, oldest first. A minute is complete about 20 s after its end."""
    totals: Throughput
    """Over these minutes."""


@router.get("/{id_or_slug}/my-throughput", responses=documented(401, 404, 422))
async def read_my_throughput(
    context: Context, caller: Caller, id_or_slug: Text, minutes: Minutes = 60
) -> Success[MyThroughput]:
    """What your pledge was owed and got, minute by minute."""
    since = service.window_start(minutes, context.clock())
    async with context.database.read() as session:
        pool = await pools.find(session, id_or_slug)
        pledge = await session.scalar(
            select(Pledge).where(
                Pledge.account_id == caller.id, Pledge.pool_id == pool.id, Pledge.state.in_(SHOWN_STATES)
            )
        )
        if pledge is None:
            raise ApiError(404, "pledge_not_found", "You have no pledge in this pool.")
        found = await service.by_minute_of_pledge(session, pledge.id, since)
    return Success(
        data=MyThroughput(
            pool_id=pool.id,
            pledge_id=pledge.id,
            guarantee_tok_s=pool.guarantee_tok_s,
            quantity=pledge.quantity,
            minutes=[ThroughputOfMinute.at(minute, sums) for minute, sums in found.items()],
            totals=Throughput.of(sum(found.values(), Sums())),
        )
    )


def shown_tokens(tokens: float) -> float:
    """Without the dust of binary fractions."""
    return round(tokens, 3)
