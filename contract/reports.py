"""Throughput reports: what a node delivered, as counters that only grow.

Cumulative within one boot of the serving process, so a lost report loses nothing: the next one has
it all. (boot_id, sequence) orders them and makes storing one twice harmless.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AwareDatetime, Field

from contract.documents import Document

Count = Annotated[int, Field(ge=0)]
Tokens = Annotated[float, Field(ge=0)]


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
    attainment_60s: Annotated[float, Field(ge=0, le=1)] | None
    """Delivered over owed in the last 60 s, at most 1; null where nothing was owed."""
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


def parse_report(text: str | bytes) -> ThroughputReport:
    """Parse a report. Raises ContractError, which names each fault by its path."""
    return ThroughputReport.parse(text, "throughput report")
