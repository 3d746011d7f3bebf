"""What happened in a simulation, as an outside observer could have written it down.

Times are seconds of the simulation's clock; prompts are numbered from 1 in order of arrival.
"""

from __future__ import annotations

from dataclasses import dataclass

from contract.step_time import StepTime


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt of a request: `count` sequences of at most `max_tokens` output tokens each."""

    number: int
    seat_id: str
    input_tokens: int
    max_tokens: int
    count: int


@dataclass(frozen=True, slots=True)
class SeatOpened:
    at: float
    seat_id: str
    quantity: int
    guarantee_tok_s: float
    prefill_tok_s: float
    rpm_limit: int
    tpm_limit: int


@dataclass(frozen=True, slots=True)
class SeatClosed:
    at: float
    seat_id: str


@dataclass(frozen=True, slots=True)
class CapacityChanged:
    at: float
    slots: int
    kv_tokens: int
    step_tokens: int


@dataclass(frozen=True, slots=True)
class MachineChanged:
    """From now on a step takes `slowdown` times what `step_time` says."""

    at: float
    step_time: StepTime
    slowdown: float


@dataclass(frozen=True, slots=True)
class Submitted:
    """A request reached the scheduler; the next event says whether it was queued or refused."""

    at: float
    seat_id: str
    prompts: tuple[Prompt, ...]
    retry: bool
    """Sent at exactly the moment that an earlier refusal of the same request had named."""


@dataclass(frozen=True, slots=True)
class Queued:
    at: float
    seat_id: str
    prompts: tuple[Prompt, ...]


@dataclass(frozen=True, slots=True)
class Refused:
    at: float
    seat_id: str
    prompts: tuple[Prompt, ...]
    reason: str
    retry_after_s: float | None


@dataclass(frozen=True, slots=True)
class Entered:
    at: float
    number: int
    cached_tokens: int
    streams: tuple[int, ...]
    """Its sequences in the engine, numbered over all prompts in order of entry."""


@dataclass(frozen=True, slots=True)
class Composed:
    """The engine has chosen what takes part in its next step."""

    at: float
    parts: tuple[tuple[int, int], ...]
    """Streams and how many tokens are computed for each."""
    held: tuple[int, ...]
    """Streams that run and were left out on purpose."""
    preempted: tuple[int, ...]
    """Streams that lost slot and KV cache, in order, since the last such event."""


@dataclass(frozen=True, slots=True)
class Stepped:
    """One engine step, at its end: per prompt its prefill tokens and its new output tokens."""

    at: float
    work: tuple[tuple[int, int, int], ...]
    ended: tuple[int, ...] = ()
    """Streams whose last token this was."""


@dataclass(frozen=True, slots=True)
class Finished:
    """A running prompt is over: complete, or its client left."""

    at: float
    number: int


@dataclass(frozen=True, slots=True)
class Canceled:
    """The client of a queued prompt left."""

    at: float
    number: int


@dataclass(frozen=True, slots=True)
class Evicted:
    at: float
    number: int
    reason: str


@dataclass(frozen=True, slots=True)
class Settled:
    """The scheduler has had its say about all that happened so far."""

    at: float
    virtual_time: float


@dataclass(frozen=True, slots=True)
class SeatTotals:
    """What the scheduler says of one seat when everything is over."""

    seat_id: str
    outcomes: tuple[tuple[str, int], ...]
    queued: int
    in_flight: int
    owed_tokens: float
    delivered_tokens: int


@dataclass(frozen=True, slots=True)
class Ended:
    at: float
    queued: int
    in_flight: int
    seats: tuple[SeatTotals, ...]


Event = (
    SeatOpened
    | SeatClosed
    | CapacityChanged
    | MachineChanged
    | Submitted
    | Queued
    | Refused
    | Entered
    | Composed
    | Stepped
    | Finished
    | Canceled
    | Evicted
    | Settled
    | Ended
)
