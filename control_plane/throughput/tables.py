"""What nodes delivered: the last counters of each boot, and sums by pledge and minute.

Counters take 64 bits: a busy node produces more than 2^31 tokens in days.
"""

from __future__ import annotations

import datetime

from sqlalchemy import BigInteger, ForeignKey, String
from sqlalchemy.orm import Mapped, mapped_column

from control_plane.database import Table


class NodeBoot(Table):
    """The last report stored of one start of a node's serving process."""

    __tablename__ = "node_boots"

    node_id: Mapped[str] = mapped_column(ForeignKey("nodes.id"), primary_key=True)
    boot_id: Mapped[str] = mapped_column(String(100), primary_key=True)
    sequence: Mapped[int] = mapped_column(BigInteger)
    at: Mapped[datetime.datetime]


class SeatCounters(Table):
    """A pledge's counters in that report: the next report's increase is counted from here."""

    __tablename__ = "seat_counters"

    node_id: Mapped[str] = mapped_column(ForeignKey("nodes.id"), primary_key=True)
    boot_id: Mapped[str] = mapped_column(String(100), primary_key=True)
    pledge_id: Mapped[str] = mapped_column(String(100), primary_key=True)
    requests: Mapped[int] = mapped_column(BigInteger)
    input_tokens: Mapped[int] = mapped_column(BigInteger)
    output_tokens: Mapped[int] = mapped_column(BigInteger)
    owed_tokens: Mapped[float]
    shortfall_tokens: Mapped[float]
    borrowed_tokens: Mapped[float] = mapped_column(default=0.0)
    held_s: Mapped[float] = mapped_column(default=0.0)
    owed_seconds: Mapped[int] = mapped_column(BigInteger, default=0)
    missed_seconds: Mapped[int] = mapped_column(BigInteger, default=0)


class ThroughputMinute(Table):
    """What one pledge was owed and got in one minute."""

    __tablename__ = "throughput_minutes"

    pledge_id: Mapped[str] = mapped_column(ForeignKey("pledges.id"), primary_key=True)
    minute: Mapped[datetime.datetime] = mapped_column(primary_key=True, index=True)
    requests: Mapped[int] = mapped_column(BigInteger)
    input_tokens: Mapped[int] = mapped_column(BigInteger)
    output_tokens: Mapped[int] = mapped_column(BigInteger)
    owed_tokens: Mapped[float]
    shortfall_tokens: Mapped[float]
    borrowed_tokens: Mapped[float] = mapped_column(default=0.0)
    held_s: Mapped[float] = mapped_column(default=0.0)
    """Sequence-seconds for which its requests were held between steps."""
    owed_seconds: Mapped[int] = mapped_column(BigInteger, default=0)
    """Whole seconds throughout which something was owed."""
    missed_seconds: Mapped[int] = mapped_column(BigInteger, default=0)
    """Of these, those that got less than 95 % of it."""
    attainment_1s: Mapped[float | None]
    """The lowest of the windows of 1 s that reports of this minute showed; None where nothing was owed."""
    attainment_10s: Mapped[float | None]
    attainment_60s: Mapped[float | None]
