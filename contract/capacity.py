"""What one node can do, and whether that honours the seats that are sold on it.

A guarantee of g output tokens per second is a *pace*: while it is owed, a step may take 1/g seconds at most.
Seats are feasible on a node when one decoding stream for each of them, its context in the KV cache, and the
prompts that their limits allow fit into `1 - margin` of such a step. Where a step has too few tokens for the
prompts of 1/g seconds, it has to be shorter by as much as it takes fewer of them. A pool is checked with this
before it is opened, by what its operator declared, and before it goes live, by what its nodes have measured.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from typing import Annotated

from pydantic import AwareDatetime, Field

from contract.documents import Document
from contract.step_time import StepTime

DEFAULT_CONTEXT_TOKENS = 2_048
"""Tokens of context that are counted for each seat's stream."""
DEFAULT_MARGIN = 0.1
"""The share of the machine that is not sold."""
MAX_TOKENS = 10**12
_ROUNDING = 1e-9

Seconds = Annotated[float, Field(ge=0, le=1e6)]


class NodeCapacity(Document):
    """What one node can do: the constants of its step time (`contract.step_time`), its slots and KV cache."""

    model_id: Annotated[str, Field(min_length=1, max_length=500)]
    base_s: Seconds
    prefill_token_s: Seconds
    decode_s: Seconds
    kv_token_s: Seconds
    experts_s: Seconds = 0.0
    active_share: Annotated[float, Field(ge=0, le=1)] = 0.0
    slots: Annotated[int, Field(ge=1, le=10**6)]
    """Streams that the engine runs at once, vLLM's max_num_seqs."""
    kv_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)]
    """That the KV cache holds."""
    step_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    """That one step computes at most, of prompts and streams together, vLLM's max_num_batched_tokens; null
    where that is not known, and then no bound."""
    error: Annotated[float, Field(ge=0)] | None = None
    """Mean relative error of the fit to the steps that were measured; null when declared."""
    # JSON has no times: also a parser that has read the JSON already must take one from its text.
    measured_at: Annotated[AwareDatetime, Field(strict=False)] | None = None
    """Null when declared."""

    @property
    def step_time(self) -> StepTime:
        return StepTime(
            base_s=self.base_s,
            prefill_token_s=self.prefill_token_s,
            decode_s=self.decode_s,
            kv_token_s=self.kv_token_s,
            experts_s=self.experts_s,
            active_share=self.active_share,
        )


@dataclass(frozen=True, slots=True)
class Promise:
    """What a pool promises to each of its seats, and how carefully it counts."""

    guarantee_tok_s: float
    """Output tokens per second; 0 promises nothing."""
    tpm_limit: int
    """Tokens per minute."""
    prefill_tok_s: float
    """Input tokens per second by which a first token is due."""
    context_tokens: int = DEFAULT_CONTEXT_TOKENS
    margin: float = DEFAULT_MARGIN

    @property
    def input_tok_s(self) -> float:
        """The prompts of one seat that have to be prefilled, at most."""
        return min(self.tpm_limit / 60, self.prefill_tok_s)


class Bound(enum.Enum):
    """What keeps seats from fitting."""

    SLOTS = "slots"
    """More seats than streams that the engine runs at once."""
    KV_TOKENS = "kv_tokens"
    """The streams' contexts do not fit into the KV cache."""
    STEP_TIME = "step_time"
    """A step with all of them takes longer than the pace allows."""
    STEP_TOKENS = "step_tokens"
    """The streams leave too few of a step's tokens to the prompts."""


@dataclass(frozen=True, slots=True)
class Feasibility:
    """Whether a node honours `seats`, and the figures that decide it."""

    seats: int
    fails: tuple[Bound, ...]
    """The bounds that are broken; none when the seats fit."""
    most_seats: int | None
    """That would fit; None where nothing is promised, so that any number does."""
    slots: int
    step_needed_ms: float
    step_allowed_ms: float | None
    """None where nothing is promised."""
    prefill_tokens_per_step: float
    kv_tokens_needed: int
    kv_tokens: int

    @property
    def fits(self) -> bool:
        return not self.fails

    def __str__(self) -> str:
        """For people: what it takes, and what there is."""
        if self.step_allowed_ms is None:
            return "nothing is guaranteed"
        return (
            f"{self.seats} seats take {self.seats} of {self.slots} slots, "
            f"{self.kv_tokens_needed:,} of {self.kv_tokens:,} tokens of KV cache, and steps of "
            f"{self.step_needed_ms:.3g} ms ({self.prefill_tokens_per_step:.0f} prompt tokens in each) where "
            f"the guarantee allows {self.step_allowed_ms:.3g} ms; {self.most_seats} seats would fit"
        )


def feasibility(
    capacity: NodeCapacity,
    *,
    seats: int,
    guarantee_tok_s: float,
    tpm_limit: int,
    prefill_tok_s: float,
    context_tokens: int = DEFAULT_CONTEXT_TOKENS,
    margin: float = DEFAULT_MARGIN,
) -> Feasibility:
    """Whether the node honours so many seats at once; with a guarantee of 0 it always does.

    `tpm_limit` and `prefill_tok_s` are of one seat; `margin` is the share of the step that stays free.
    """
    promise = Promise(guarantee_tok_s, tpm_limit, prefill_tok_s, context_tokens, margin)
    return judge(capacity, promise, seats)


def judge(capacity: NodeCapacity, promise: Promise, seats: int) -> Feasibility:
    """`feasibility`, of a promise made before."""
    promised = promise.guarantee_tok_s > 0
    return Feasibility(
        seats=seats,
        fails=_broken(capacity, promise, seats) if promised else (),
        most_seats=_most_seats(capacity, promise) if promised else None,
        slots=capacity.slots,
        step_needed_ms=1000 * _step_s(capacity, promise, seats),
        step_allowed_ms=1000 * _allowed_s(capacity, promise, seats) if promised else None,
        prefill_tokens_per_step=_prefill_per_step(capacity, promise, seats),
        kv_tokens_needed=seats * promise.context_tokens,
        kv_tokens=capacity.kv_tokens,
    )


def _broken(capacity: NodeCapacity, promise: Promise, seats: int) -> tuple[Bound, ...]:
    # No seats, no promise: the time of an empty step breaks none.
    allowed_s = _allowed_s(capacity, promise, seats)
    too_slow = seats > 0 and _step_s(capacity, promise, seats) > allowed_s * (1 + _ROUNDING)
    short_of_tokens = _prefill_per_step(capacity, promise, seats) < _prefill_per_pace(promise, seats)
    broken = {
        Bound.SLOTS: seats > capacity.slots,
        Bound.KV_TOKENS: seats * promise.context_tokens > capacity.kv_tokens,
        Bound.STEP_TIME: too_slow and not short_of_tokens,
        Bound.STEP_TOKENS: too_slow and short_of_tokens,
    }
    return tuple(bound for bound, holds in broken.items() if holds)


def _most_seats(capacity: NodeCapacity, promise: Promise) -> int:
    """Every bound is monotone in the seats, so halving finds the last number that fits."""
    fits, too_many = 0, capacity.slots + 1
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        if _broken(capacity, promise, middle):
            too_many = middle
        else:
            fits = middle
    return fits


def _step_s(capacity: NodeCapacity, promise: Promise, seats: int) -> float:
    prefill = _prefill_per_step(capacity, promise, seats)
    return capacity.step_time.seconds(prefill, seats, seats * promise.context_tokens)


def _prefill_per_pace(promise: Promise, seats: int) -> float:
    """Prompt tokens that come while each stream makes one token."""
    if promise.guarantee_tok_s <= 0:
        return 0.0
    return seats * promise.input_tok_s / promise.guarantee_tok_s


def _prefill_per_step(capacity: NodeCapacity, promise: Promise, seats: int) -> float:
    """Of these, those that one step can take."""
    wanted = _prefill_per_pace(promise, seats)
    return wanted if capacity.step_tokens is None else min(wanted, max(0, capacity.step_tokens - seats))


def _allowed_s(capacity: NodeCapacity, promise: Promise, seats: int) -> float:
    # A guarantee may be so small that no float holds its pace.
    pace_s = 1 / promise.guarantee_tok_s if promise.guarantee_tok_s > 1e-300 else math.inf
    taken, wanted = _prefill_per_step(capacity, promise, seats), _prefill_per_pace(promise, seats)
    if taken < wanted:
        pace_s = taken / (seats * promise.input_tok_s)
    return (1 - promise.margin) * pace_s


def parse_capacity(text: str | bytes) -> NodeCapacity:
    """Parse what `boosts capacity` wrote. Raises ContractError, which names each fault by its path."""
    return NodeCapacity.parse(text, "capacity")
