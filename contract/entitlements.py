"""Entitlements: the full, versioned snapshot of who may use a node, when, and with what guarantee.

Always the whole state, never a change to it, so that a reader that missed ten versions is as well
off as one that missed none. A snapshot needs no call at a block border: it holds the block times.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from typing import Annotated, Literal, Self

from pydantic import (
    AwareDatetime,
    BeforeValidator,
    Field,
    PlainSerializer,
    model_validator,
)

from contract.blocks import Block, DaySpan, format_clock, parse_clock
from contract.documents import Document

MAX_PLEDGES = 10_000
MAX_LIMIT = 10**12


def _clock(value: object) -> object:
    return parse_clock(value) if isinstance(value, str) else value


Name = Annotated[str, Field(min_length=1, max_length=100)]

ClockTime = Annotated[int, BeforeValidator(_clock), PlainSerializer(format_clock, when_used="json")]
"""Seconds since midnight UTC; `HH:MM` or `HH:MM:SS` in JSON."""


class PledgeStatus(enum.Enum):
    ACTIVE = "active"
    PAST_DUE = "past_due"


class PoolStatus(enum.Enum):
    ACTIVATING = "activating"
    ACTIVE = "active"
    PAUSED = "paused"


class BlockTime(Document):
    """One block of a pledge, with its times spelled out."""

    block: Block
    starts: ClockTime
    ends: ClockTime

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        _ = self.span
        return self

    @property
    def span(self) -> DaySpan:
        return DaySpan(self.starts, self.ends)

    @classmethod
    def of(cls, block: Block) -> BlockTime:
        """The block at its fixed hours."""
        return cls(block=block, starts=block.span.start_s, ends=block.span.end_s)


class PledgeEntitlement(Document):
    """One pledge: its key, when it may be used, and what it may use."""

    pledge_id: Name
    key_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    status: PledgeStatus
    quantity: Annotated[int, Field(ge=1, le=20)]
    rpm_limit: Annotated[int, Field(ge=1, le=MAX_LIMIT)]
    """Requests per minute over the whole quantity."""
    tpm_limit: Annotated[int, Field(ge=1, le=MAX_LIMIT)]
    """Tokens per minute, input and output, over the whole quantity."""
    blocks: Annotated[tuple[BlockTime, ...], Field(min_length=1, max_length=len(Block))]
    valid_until: AwareDatetime
    """Without a newer snapshot the pledge ends here (period end + 72 h)."""

    @property
    def spans(self) -> tuple[DaySpan, ...]:
        return tuple(block.span for block in self.blocks)


class PoolTerms(Document):
    """What every seat of the pool has in common."""

    slug: Name
    status: PoolStatus
    guarantee_tok_s: Annotated[float, Field(ge=0)]
    """Output tokens per second guaranteed to each seat; 0 for none."""
    prefill_tok_s: Annotated[float, Field(gt=0)]
    """Input tokens per second by which a first token is due, for each seat."""


class Entitlements(Document):
    """A snapshot. Of one store, a higher revision is newer."""

    version: Literal[1]
    store_id: Name
    revision: Annotated[int, Field(ge=1)]
    pool: PoolTerms
    pledges: Annotated[tuple[PledgeEntitlement, ...], Field(max_length=MAX_PLEDGES)]

    @model_validator(mode="after")
    def _unique(self) -> Self:
        _refuse_repeated("pledge_id", (pledge.pledge_id for pledge in self.pledges))
        _refuse_repeated("key_sha256", (pledge.key_sha256 for pledge in self.pledges))
        return self

    def to_json(self) -> str:
        return self.model_dump_json(indent=2)


def parse_entitlements(text: str | bytes) -> Entitlements:
    """Parse a snapshot. Raises ContractError, which names each fault by its path."""
    return Entitlements.parse(text, "entitlements")


def _refuse_repeated(field: str, values: Iterable[str]) -> None:
    seen: set[str] = set()
    for value in values:
        if value in seen:
            raise ValueError(f"{field} {value!r} stands twice; each pledge needs its own")
        seen.add(value)
