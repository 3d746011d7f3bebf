"""Pools, their blocks and their seats."""

from __future__ import annotations

import datetime
import enum
from typing import Any

from sqlalchemy import JSON, ForeignKey, Index, String, Text, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from contract.blocks import Block
from contract.capacity import DEFAULT_CONTEXT_TOKENS, DEFAULT_MARGIN
from control_plane.database import Table, new_id, stored_enum


class PoolState(enum.Enum):
    """draft -> funding -> activating -> active <-> paused; activating -> funding when charges fail."""

    DRAFT = "draft"
    FUNDING = "funding"
    ACTIVATING = "activating"
    ACTIVE = "active"
    PAUSED = "paused"


class Pool(Table):
    __tablename__ = "pools"

    id: Mapped[str] = mapped_column(String(36), primary_key=True, default=new_id)
    slug: Mapped[str] = mapped_column(String(100), unique=True)
    model_id: Mapped[str] = mapped_column(String(500))
    model_name: Mapped[str] = mapped_column(String(200))
    description: Mapped[str] = mapped_column(Text)
    infra_spec: Mapped[str] = mapped_column(Text)
    state: Mapped[PoolState] = mapped_column(stored_enum(PoolState))
    min_seats: Mapped[int]
    """Seats over all blocks that have to be pledged before the pool goes live."""
    guarantee_tok_s: Mapped[float]
    prefill_tok_s: Mapped[float]
    rpm_limit: Mapped[int]
    """Per seat, like tpm_limit."""
    tpm_limit: Mapped[int]
    engine_flags: Mapped[list[str]] = mapped_column(JSON)
    nodes: Mapped[int] = mapped_column(default=1)
    """That its operator means to run: a pledge lives on one of them."""
    context_tokens: Mapped[int] = mapped_column(default=DEFAULT_CONTEXT_TOKENS)
    """Counted for each seat's stream when capacity is judged."""
    capacity_margin: Mapped[float] = mapped_column(default=DEFAULT_MARGIN)
    """The share of each node that is not sold."""
    declared_capacity: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    """Of one node, as its operator declared it: a `contract.capacity.NodeCapacity`."""
    revision: Mapped[int] = mapped_column(default=1)
    """Raised with every change that a node has to know (`control_plane.pools.service.touch`)."""
    activation: Mapped[int] = mapped_column(default=0)
    """Number of the current or last attempt to go live: each charges anew."""
    created_at: Mapped[datetime.datetime]
    paused_at: Mapped[datetime.datetime | None]


class PoolBlock(Table):
    """One block that a pool sells."""

    __tablename__ = "pool_blocks"

    pool_id: Mapped[str] = mapped_column(ForeignKey("pools.id"), primary_key=True)
    block: Mapped[Block] = mapped_column(stored_enum(Block), primary_key=True)
    seats: Mapped[int]
    price_cents: Mapped[int]
    """Of one seat for a month."""


class Seat(Table):
    """One seat of one block: made when the pool opens, never changed."""

    __tablename__ = "seats"
    __table_args__ = (UniqueConstraint("pool_id", "block", "slot_index"),)

    id: Mapped[str] = mapped_column(String(36), primary_key=True, default=new_id)
    pool_id: Mapped[str] = mapped_column(ForeignKey("pools.id"))
    block: Mapped[Block] = mapped_column(stored_enum(Block))
    slot_index: Mapped[int]


class Reservation(Table):
    """A seat taken by a pledge, until it is released. The index is the last line against selling twice."""

    __tablename__ = "reservations"

    id: Mapped[str] = mapped_column(String(36), primary_key=True, default=new_id)
    seat_id: Mapped[str] = mapped_column(ForeignKey("seats.id"))
    pledge_id: Mapped[str] = mapped_column(ForeignKey("pledges.id"), index=True)
    released_at: Mapped[datetime.datetime | None]


def _only_open(column: Any) -> dict[str, Any]:
    return {"sqlite_where": column.is_(None), "postgresql_where": column.is_(None)}


Index("uq_reservations_open_seat", Reservation.seat_id, unique=True, **_only_open(Reservation.released_at))
