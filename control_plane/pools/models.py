"""What the pools API shows of a pool, and what an operator says to make one."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Annotated, Self

from pydantic import AfterValidator, Field, model_validator

from contract.blocks import Block
from contract.capacity import DEFAULT_CONTEXT_TOKENS, DEFAULT_MARGIN, NodeCapacity
from control_plane.envelope import Shown
from control_plane.money import HOURS, show, slot_price
from control_plane.pledges.tables import SUBSCRIBED_STATES, PledgeState
from control_plane.pools.tables import Pool, PoolBlock, Seat
from control_plane.text import Name, Text

MAX_SEATS = 1_000
"""In one block."""
MAX_LIMIT = 10**9
_SLUG = r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$"


def _not_an_id(slug: str) -> str:
    try:
        uuid.UUID(slug)
    except ValueError:
        return slug
    raise ValueError("must not have the form of an id: addresses take either")


class BlockOffer(Shown):
    """What a pool sells in one block."""

    seats: Annotated[int, Field(ge=1, le=MAX_SEATS)]
    monthly_price: Annotated[Decimal, Field(ge=0, le=1_000_000, decimal_places=2)]
    """USD for one seat and one month, at most two decimals."""

    @property
    def price_cents(self) -> int:
        return int(self.monthly_price * 100)


class PoolTerms(Shown):
    """What an operator offers. Fixed once the pool is open."""

    slug: Annotated[str, Field(pattern=_SLUG, max_length=100), AfterValidator(_not_an_id)]
    model_id: Annotated[Text, Field(pattern=r"^[^-\s]", max_length=500)]
    """The model for vLLM, a Hugging Face id or a folder; also its name for customers."""
    model_name: Name
    description: Annotated[Text, Field(max_length=5_000)] = ""
    infra_spec: Annotated[Text, Field(max_length=500)] = ""
    blocks: Annotated[dict[Block, BlockOffer], Field(min_length=1)]
    min_seats: Annotated[int, Field(ge=1, le=3 * MAX_SEATS)]
    """Seats over all blocks that have to be pledged before the pool goes live."""
    guarantee_tok_s: Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]
    """Output tokens per second guaranteed to each seat."""
    prefill_tok_s: Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False)] = 1_000.0
    """Input tokens per second by which a seat's first token is due."""
    rpm_limit: Annotated[int, Field(ge=1, le=MAX_LIMIT)]
    """Requests per minute of one seat."""
    tpm_limit: Annotated[int, Field(ge=1, le=MAX_LIMIT)]
    """Tokens per minute, input and output, of one seat."""
    nodes: Annotated[int, Field(ge=1, le=MAX_SEATS)] = 1
    """That will serve it. A pledge lives wholly on one, so capacity is judged node by node."""
    declared_capacity: NodeCapacity | None = None
    """What one node can do, as `boosts capacity` writes it; needed to open a pool with a guarantee."""
    context_tokens: Annotated[int, Field(ge=1, le=10**8)] = DEFAULT_CONTEXT_TOKENS
    """Tokens of context that are counted for each seat's stream when capacity is judged."""
    capacity_margin: Annotated[float, Field(ge=0, lt=1)] = DEFAULT_MARGIN
    """The share of each node that is not sold."""
    engine_args: list[Text] | dict[Text, bool | int | float | Text] = Field(default_factory=list)
    """vLLM's own flags, as a list or by name: `["--max-num-seqs", "256"]`, `{"max-num-seqs": 256}`."""

    @model_validator(mode="after")
    def _reachable(self) -> Self:
        offered = sum(offer.seats for offer in self.blocks.values())
        if self.min_seats > offered:
            raise ValueError(f"minSeats is {self.min_seats}, but the blocks have only {offered} seats in all")
        return self

    @model_validator(mode="after")
    def _of_this_model(self) -> Self:
        declared = self.declared_capacity
        if declared is not None and declared.model_id != self.model_id:
            raise ValueError(
                f"declaredCapacity is of the model {declared.model_id!r}, but modelId is {self.model_id!r}"
            )
        return self

    @property
    def engine_flags(self) -> list[str]:
        if isinstance(self.engine_args, list):
            return list(self.engine_args)
        flags: list[str] = []
        for name, value in self.engine_args.items():
            flag = "--" + name.lstrip("-").replace("_", "-")
            if value is True:
                flags.append(flag)
            elif value is not False:
                flags += [flag, str(value)]
        return flags


class PoolSummary(Shown):
    """A pool in the list."""

    id: str
    slug: str
    model_id: str
    model_name: str
    description: str
    infra_spec: str
    status: str
    total_slots: int
    """Seats over all blocks."""
    pledged_slots: int
    """Of them, those reserved."""
    min_price_per_day: str
    """The lowest monthly price of a block, USD; named as the public API names it."""

    @classmethod
    def of(cls, pool: Pool, blocks: Sequence[PoolBlock], reserved: int) -> Self:
        return cls.model_validate(_summary(pool, blocks, reserved))


def _summary(pool: Pool, blocks: Sequence[PoolBlock], reserved: int) -> dict[str, object]:
    return {
        "id": pool.id,
        "slug": pool.slug,
        "model_id": pool.model_id,
        "model_name": pool.model_name,
        "description": pool.description,
        "infra_spec": pool.infra_spec,
        "status": pool.state.value,
        "total_slots": sum(row.seats for row in blocks),
        "pledged_slots": reserved,
        "min_price_per_day": show(min(row.price_cents for row in blocks)),
    }


class HourSlot(Shown):
    """One hour of one seat."""

    id: str
    hour: Annotated[int, Field(ge=0, le=23)]
    slot_index: int
    price_per_day: str
    """This hour's part of the seat's monthly price, USD; the eight hours of a block add up to it."""
    status: str
    """available, pledged or active."""


class BlockSummary(Shown):
    """What one block still offers."""

    seats: int
    available: int
    monthly_price: str


class PoolDetail(PoolSummary):
    """A pool with all its hour slots."""

    min_seats: int
    guarantee_tok_s: float
    rpm_limit: int
    tpm_limit: int
    blocks: dict[str, BlockSummary]
    hour_slots: list[HourSlot]

    @classmethod
    def with_slots(
        cls, pool: Pool, blocks: Sequence[PoolBlock], seats: Iterable[tuple[Seat, PledgeState | None]]
    ) -> PoolDetail:
        """`seats` are all of the pool, each with the state of the pledge that has it."""
        prices = {row.block: row.price_cents for row in blocks}
        slots: list[HourSlot] = []
        available = dict.fromkeys(prices, 0)
        reserved = 0
        for seat, taken_by in seats:
            reserved += taken_by is not None
            available[seat.block] += taken_by is None
            slots += hour_slots(seat, prices[seat.block], _slot_status(taken_by))
        return cls(
            **_summary(pool, blocks, reserved),
            min_seats=pool.min_seats,
            guarantee_tok_s=pool.guarantee_tok_s,
            rpm_limit=pool.rpm_limit,
            tpm_limit=pool.tpm_limit,
            blocks=_block_summaries(blocks, available),
            hour_slots=sorted(slots, key=lambda slot: (slot.slot_index, slot.hour)),
        )


def _block_summaries(blocks: Sequence[PoolBlock], available: Mapping[Block, int]) -> dict[str, BlockSummary]:
    return {
        row.block.value: BlockSummary(
            seats=row.seats,
            available=available[row.block],
            monthly_price=show(row.price_cents),
        )
        for row in blocks
    }


def _slot_status(taken_by: PledgeState | None) -> str:
    if taken_by is None:
        return "available"
    return "active" if taken_by in SUBSCRIBED_STATES else "pledged"


def hour_slots(seat: Seat, price_cents: int, status: str) -> list[HourSlot]:
    """The eight hours of a seat. Their ids follow from the seat's, so they need no rows of their own."""
    first = seat.block.first_hour
    number = uuid.UUID(seat.id).int
    return [
        HourSlot(
            id=str(uuid.UUID(int=number ^ (hour + 1))),
            hour=first + hour,
            slot_index=seat.slot_index,
            price_per_day=show(slot_price(price_cents, hour)),
            status=status,
        )
        for hour in range(HOURS)
    ]
