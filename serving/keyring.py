"""Whose key it is and whether it may be used now, out of the entitlements snapshot."""

from __future__ import annotations

from contract.blocks import is_open
from contract.entitlements import Entitlements, PledgeEntitlement, PledgeStatus
from contract.keys import KeyKind, is_key, key_sha256
from scheduler import Reason, SeatTerms


class Keyring:
    """One snapshot, indexed by key hash. Immutable: a new snapshot gets a new keyring."""

    def __init__(self, entitlements: Entitlements) -> None:
        self.entitlements = entitlements
        self.pledges = {pledge.pledge_id: pledge for pledge in entitlements.pledges}
        self._by_hash = {pledge.key_sha256: pledge for pledge in entitlements.pledges}

    def find(self, key: str) -> PledgeEntitlement | None:
        """The pledge that `key` opens; None for a mistyped or unknown key."""
        # The checksum first: it costs less than the hash and turns most garbage away.
        return self._by_hash.get(key_sha256(key)) if is_key(key, KeyKind.BOOST) else None

    def terms(self, pledge: PledgeEntitlement) -> SeatTerms:
        """What the scheduler has to know about the pledge's seats."""
        pool = self.entitlements.pool
        return SeatTerms(
            seat_id=pledge.pledge_id,
            quantity=pledge.quantity,
            guarantee_tok_s=pool.guarantee_tok_s,
            prefill_tok_s=pool.prefill_tok_s,
            rpm_limit=pledge.rpm_limit,
            tpm_limit=pledge.tpm_limit,
        )

    @staticmethod
    def standing(pledge: PledgeEntitlement, now: float) -> Reason | None:
        """Why the pledge may not be used at `now` (seconds since the epoch); None if it may."""
        if pledge.status is PledgeStatus.PAST_DUE or now >= pledge.valid_until.timestamp():
            return Reason.SUSPENDED
        return None if is_open(pledge.spans, now) else Reason.OUTSIDE_BLOCK
