"""What the scheduler is told: the engine's capacity, the policy's constants, a seat's terms, a request."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Capacity:
    """What one engine can hold at once."""

    slots: int
    """Sequences the engine runs together (vLLM's `max_num_seqs`)."""
    kv_tokens: int
    """Tokens the KV cache holds over all sequences."""
    step_tokens: int | None = None
    """Tokens the engine computes in one step, of prompts and decodes (vLLM's `max_num_batched_tokens`); None
    where nobody has told. Admission needs it not."""

    def __post_init__(self) -> None:
        if self.slots < 1 or self.kv_tokens < 1:
            raise ValueError(f"capacity must be positive, got {self}")


@dataclass(frozen=True, slots=True)
class Policy:
    """Constants of the scheduling contract, the same for every seat of a node."""

    input_weight: float = 1.0
    """Cost of one uncached input token."""
    output_weight: float = 2.0
    """Cost of one output token. 1 and 2 as in VTC (Sheng et al., OSDI 2024)."""
    first_token_grace_s: float = 1.0
    """T0: a first token is due by `submit + T0 + input / prefill_tok_s`, unless the seat has
    unread prompts before it."""
    queue_timeout_s: float = 60.0
    """A queued request is evicted after this long, never before."""
    max_queued_per_seat: int = 256
    """Requests one seat may have queued, times its quantity."""
    initial_output_tokens: float = 256.0
    """Expected output of a seat that has not finished a request yet."""
    output_mean_smoothing: float = 0.1
    """Weight of the newest finished request in a seat's running mean of output tokens."""
    foreseen_share: float = 0.25
    """Share of the expected output that is charged at dispatch, the rest as it comes. With more, seats lead
    each other by the luck of lengths; with none, by what was let in before its cost showed."""
    ahead_s: float = 0.03
    """Borrowed sequences are sent to the engine beyond its slots, as many as end in this time: they wait
    inside, so that a slot is taken in the step after it is free, and not when the next one has come through
    a busy API server. What is inside is out of the fair order, so no more than needed."""
    spare_from_per_s: float = 0.3
    """While owed requests enter more often than this, borrowed ones leave slots free for the next of them:
    as many as come in twice the time in which a slot gets free. An empty slot costs next to nothing, since
    steps are shorter without it; one taken from a running sequence costs all that is computed again."""
    elastic_share: float = 0.0625
    """No more than this share of the slots is exceeded or left free so."""
    prefix_caching: bool = True
    """Whether the engine computes a prompt once for all its `n` sequences, or once for each."""


@dataclass(frozen=True, slots=True)
class SeatTerms:
    """What one pledge's seats were sold. The scheduler calls all seats of one pledge a seat:
    they share a key, a queue and a weight."""

    seat_id: str
    quantity: int
    guarantee_tok_s: float
    """g, output tokens per second for each of `quantity` streams; 0 for none."""
    prefill_tok_s: float
    """Input tokens per second at which each of them reads, so that a first token is due by it."""
    rpm_limit: int
    """Requests per minute, over the whole quantity."""
    tpm_limit: int
    """Input plus output tokens per minute, over the whole quantity."""

    def __post_init__(self) -> None:
        if self.quantity < 1 or self.guarantee_tok_s < 0 or self.prefill_tok_s <= 0:
            raise ValueError(f"impossible terms: {self}")
        if self.rpm_limit < 1 or self.tpm_limit < 1:
            raise ValueError(f"limits must be at least 1: {self}")

    @property
    def weight(self) -> float:
        """Share of what is left over, proportional to the quantity."""
        return float(self.quantity)


@dataclass(frozen=True, slots=True)
class Ask:
    """One prompt as it arrives at the engine's door, after tokenisation."""

    input_tokens: int
    max_tokens: int
    """Most output tokens for each of `count` sequences."""
    count: int = 1
    """Sequences sampled from the prompt (`n`); each counts as a request."""

    def __post_init__(self) -> None:
        if self.input_tokens < 0 or self.max_tokens < 1 or self.count < 1:
            raise ValueError(f"impossible request: {self}")
