"""Throughput reports: what a node delivered, as counters that only grow.

Cumulative within one boot of the serving process, so a lost report loses nothing: the next one has
it all. (boot_id, sequence) orders them and makes storing one twice harmless.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AwareDatetime, Field

from contract.capacity import NodeCapacity
from contract.documents import Document

Count = Annotated[int, Field(ge=0)]
Tokens = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class SeatThroughput(Document):
    """One pledge's counters since boot, and its state now."""

    pledge_id: Annotated[str, Field(min_length=1, max_length=100)]
    dispatched: Count
    rejected: Count
    evicted: Count
    canceled: Count
    input_tokens: Count
    cached_tokens: Count
    """Of the input tokens, those the prefix cache had."""
    output_tokens: Count
    """Delivered: tokens the engine produced, whatever the client read of them."""
    owed_tokens: Tokens
    shortfall_tokens: Tokens
    """Owed and not delivered by the end of their busy period."""
    borrowed_tokens: Tokens = 0.0
    """Delivered beyond what was owed. Like what follows with a default: reports of before have none."""
    held_s: Annotated[float, Field(ge=0)] = 0.0
    """Sequence-seconds that its requests were held between steps."""
    owed_seconds: Count = 0
    """Whole seconds throughout which something was owed."""
    missed_seconds: Count = 0
    """Of these, those that got less than 95 % of it."""
    attainment_1s: Share | None = None
    """Delivered over owed in the worst second of the last 12, at most 1; null where nothing was owed for a
    whole second."""
    attainment_10s: Share | None = None
    """In the last 10 s."""
    attainment_60s: Share | None
    """In the last 60 s."""
    queued: Count
    in_flight: Count


class ThroughputReport(Document):
    """What serving's stats endpoint answers and a control plane stores."""

    version: Literal[1]
    boot_id: Annotated[str, Field(min_length=1, max_length=100)]
    sequence: Annotated[int, Field(ge=1)]
    at: AwareDatetime
    entitlements_revision: Count
    seats: tuple[SeatThroughput, ...]
    capacity: NodeCapacity | None = None
    """What serving has measured of itself; null until it has."""


def parse_report(text: str | bytes) -> ThroughputReport:
    """Parse a report. Raises ContractError, which names each fault by its path."""
    return ThroughputReport.parse(text, "throughput report")
