"""Good documents to start from."""

from __future__ import annotations

from typing import Any


def entitlements(**changes: Any) -> dict[str, Any]:
    return {
        "version": 1,
        "store_id": "store",
        "revision": 3,
        "pool": {"slug": "demo", "status": "active", "guarantee_tok_s": 20.0, "prefill_tok_s": 1000.0},
        "pledges": [pledge("a", "0"), pledge("b", "1")],
    } | changes


def pledge(name: str, digit: str, **changes: Any) -> dict[str, Any]:
    return {
        "pledge_id": name,
        "key_sha256": digit * 64,
        "status": "active",
        "quantity": 1,
        "rpm_limit": 60,
        "tpm_limit": 100_000,
        "blocks": [{"block": "night", "starts": "00:00", "ends": "08:00"}],
        "valid_until": "2030-01-01T00:00:00Z",
    } | changes


def capacity(**changes: Any) -> dict[str, Any]:
    """Declared, of a node that honours 100 seats and more at 50 tok/s."""
    return {
        "model_id": "org/model",
        "base_s": 0.005,
        "prefill_token_s": 2e-6,
        "decode_s": 1e-5,
        "kv_token_s": 1e-8,
        "slots": 256,
        "kv_tokens": 4_000_000,
        "step_tokens": 8_192,
    } | changes


def measured(**changes: Any) -> dict[str, Any]:
    """The same, measured."""
    return capacity(error=0.02, measured_at="2026-01-01T00:00:00Z") | changes


def report(**changes: Any) -> dict[str, Any]:
    seat = {
        "pledge_id": "a",
        "dispatched": 1,
        "rejected": 0,
        "evicted": 0,
        "canceled": 0,
        "input_tokens": 5,
        "cached_tokens": 0,
        "output_tokens": 7,
        "owed_tokens": 6.5,
        "shortfall_tokens": 0.0,
        "attainment_60s": None,
        "queued": 0,
        "in_flight": 0,
    }
    return {
        "version": 1,
        "boot_id": "boot",
        "sequence": 1,
        "at": "2026-01-01T00:00:00Z",
        "entitlements_revision": 3,
        "seats": [seat],
    } | changes
