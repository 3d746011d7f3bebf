"""The seats of a benchmark, and the entitlements file that gives them to a node."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from contract.blocks import Block
from contract.entitlements import (
    BlockTime,
    Entitlements,
    PledgeEntitlement,
    PledgeStatus,
    PoolStatus,
    PoolTerms,
)
from contract.keys import KeyKind, key_sha256, new_key

# Far beyond what a benchmark sends: the limits are not what is measured.
_UNLIMITED_RPM = 1_000_000
_UNLIMITED_TPM = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Seat:
    """One pledge of the benchmark; its key is good at every hour of the day."""

    name: str
    quantity: int = 1
    key: str = field(default_factory=lambda: new_key(KeyKind.BOOST), repr=False)


def write_entitlements(
    seats: Sequence[Seat],
    path: Path,
    *,
    guarantee_tok_s: float,
    prefill_tok_s: float = 2000.0,
    revision: int = 1,
) -> None:
    """Write the snapshot with these seats, each guaranteed `guarantee_tok_s` times its quantity.

    A running node takes it over when its `revision` is higher than that of the one in use.
    """
    snapshot = Entitlements(
        version=1,
        store_id="benchmark",
        revision=revision,
        pool=PoolTerms(
            slug="benchmark",
            status=PoolStatus.ACTIVE,
            guarantee_tok_s=guarantee_tok_s,
            prefill_tok_s=prefill_tok_s,
        ),
        pledges=tuple(
            PledgeEntitlement(
                pledge_id=seat.name,
                key_sha256=key_sha256(seat.key),
                status=PledgeStatus.ACTIVE,
                quantity=seat.quantity,
                rpm_limit=_UNLIMITED_RPM,
                tpm_limit=_UNLIMITED_TPM,
                blocks=tuple(BlockTime.of(block) for block in Block),
                valid_until=datetime.now(UTC) + timedelta(days=1),
            )
            for seat in seats
        ),
    )
    # Whole or not at all: a node may be reading it.
    beside = path.with_suffix(".new")
    beside.write_text(snapshot.to_json())
    beside.replace(path)
