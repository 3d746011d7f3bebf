"""Nodes and the tokens they join with."""

from __future__ import annotations

import datetime
from typing import Any

from sqlalchemy import JSON, BigInteger, ForeignKey, String, Text
from sqlalchemy.orm import Mapped, mapped_column

from contract.nodes import ServingState
from control_plane.database import Table, new_id, stored_enum


class Node(Table):
    __tablename__ = "nodes"

    id: Mapped[str] = mapped_column(String(36), primary_key=True, default=new_id)
    pool_id: Mapped[str] = mapped_column(ForeignKey("pools.id"), index=True)
    name: Mapped[str] = mapped_column(String(100))
    token_sha256: Mapped[str] = mapped_column(String(64), unique=True)
    draining: Mapped[bool] = mapped_column(default=False)
    """The operator wants it empty and stopped."""
    retired: Mapped[bool] = mapped_column(default=False)
    """It will not come back: its token opens nothing, and its pledges live elsewhere."""
    epoch: Mapped[int] = mapped_column(default=0)
    """Of the agent that registered last; 0 before the first."""
    boot_id: Mapped[str | None] = mapped_column(String(100))
    base_url: Mapped[str | None] = mapped_column(String(500))
    created_at: Mapped[datetime.datetime]

    # From the last heartbeat.
    heard_at: Mapped[datetime.datetime | None]
    serving: Mapped[ServingState] = mapped_column(stored_enum(ServingState), default=ServingState.STOPPED)
    model_id: Mapped[str | None] = mapped_column(Text)
    revision: Mapped[int] = mapped_column(BigInteger, default=0)
    restarts: Mapped[int] = mapped_column(BigInteger, default=0)
    spooled_reports: Mapped[int] = mapped_column(BigInteger, default=0)
    clock_offset_ms: Mapped[float | None]
    gpus: Mapped[list[dict[str, Any]]] = mapped_column(JSON, default=list)
    problem: Mapped[str | None] = mapped_column(Text)
    capacity: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    """The last that it measured of itself: a `contract.capacity.NodeCapacity`; None until it has."""
    capacity_at: Mapped[datetime.datetime | None]
    """When it last told us."""


class JoinToken(Table):
    """Lets one node join one pool, once, for a while."""

    __tablename__ = "join_tokens"

    token_sha256: Mapped[str] = mapped_column(String(64), primary_key=True)
    pool_id: Mapped[str] = mapped_column(ForeignKey("pools.id"))
    expires_at: Mapped[datetime.datetime]
    used_by: Mapped[str | None] = mapped_column(ForeignKey("nodes.id"))


class Store(Table):
    """One row: which database this is. Revisions of different stores cannot be compared."""

    __tablename__ = "store"

    id: Mapped[str] = mapped_column(String(36), primary_key=True, default=new_id)
