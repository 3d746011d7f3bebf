"""Pledges and the states of their life."""

from __future__ import annotations

import datetime
import enum
from typing import Any

from sqlalchemy import JSON, BigInteger, ForeignKey, Index, String
from sqlalchemy.orm import Mapped, mapped_column

from contract.blocks import Block
from control_plane.database import Table, new_id, stored_enum


class PledgeState(enum.Enum):
    """held -> pledged -> active <-> past_due; any of them -> canceled. In a live pool held -> active."""

    HELD = "held"
    """Seats are kept while a card is charged; shown to nobody."""
    PLEDGED = "pledged"
    ACTIVE = "active"
    PAST_DUE = "past_due"
    CANCELED = "canceled"


OPEN_STATES = frozenset({PledgeState.HELD, PledgeState.PLEDGED, PledgeState.ACTIVE, PledgeState.PAST_DUE})
"""Those that take seats."""
SHOWN_STATES = OPEN_STATES - {PledgeState.HELD}
"""Those that the customer sees."""
SUBSCRIBED_STATES = frozenset({PledgeState.ACTIVE, PledgeState.PAST_DUE})
"""Those that have a key and a paid period."""


class Pledge(Table):
    __tablename__ = "pledges"

    id: Mapped[str] = mapped_column(String(36), primary_key=True, default=new_id)
    account_id: Mapped[str] = mapped_column(ForeignKey("accounts.id"), index=True)
    pool_id: Mapped[str] = mapped_column(ForeignKey("pools.id"), index=True)
    node_id: Mapped[str | None] = mapped_column(ForeignKey("nodes.id"), index=True)
    """The node that serves it, from activation on: a pledge lives wholly on one."""
    state: Mapped[PledgeState] = mapped_column(stored_enum(PledgeState), index=True)
    blocks: Mapped[list[str]] = mapped_column(JSON)
    """Values of Block, in the day's order."""
    quantity: Mapped[int]
    """Seats in each of the blocks."""
    price_cents: Mapped[int] = mapped_column(BigInteger)
    """Of all its seats for a month."""
    created_at: Mapped[datetime.datetime]
    activated_at: Mapped[datetime.datetime | None]
    billing_anchor: Mapped[datetime.datetime | None]
    """Start of the first period: later ones begin on the same day of the month."""
    periods: Mapped[int] = mapped_column(default=0)
    """Months paid since the anchor."""
    current_period_end: Mapped[datetime.datetime | None] = mapped_column(index=True)
    cancel_at_period_end: Mapped[bool] = mapped_column(default=False)
    failed_renewals: Mapped[int] = mapped_column(default=0)
    """Declined in a row, on schedule, for the period that is due."""
    next_attempt_at: Mapped[datetime.datetime | None]
    """When a declined renewal is tried again."""
    retry_now: Mapped[bool] = mapped_column(default=False)
    """Past due, and another card was put on file: it is tried at once, beside the schedule."""
    ended_at: Mapped[datetime.datetime | None]
    ended_because: Mapped[str | None] = mapped_column(String(50))

    @property
    def reserved_blocks(self) -> list[Block]:
        return [Block(value) for value in self.blocks]

    @property
    def seats(self) -> int:
        """Over all its blocks."""
        return self.quantity * len(self.blocks)


def _only_open_states() -> dict[str, Any]:
    condition = Pledge.state != PledgeState.CANCELED
    return {"sqlite_where": condition, "postgresql_where": condition}


Index("uq_pledges_open", Pledge.account_id, Pledge.pool_id, unique=True, **_only_open_states())
