"""From the scheduler's reason to what the client reads: status, code, figures, and when to come back."""

from __future__ import annotations

import datetime

from contract.blocks import next_opening
from contract.entitlements import PledgeEntitlement
from scheduler import Reason, Refusal
from serving.envelopes import ApiError

DRAIN_RETRY_S = 30.0
"""A node that drains is replaced or restarted; by then another answers."""


def api_error(refusal: Refusal, pledge: PledgeEntitlement, pool: str, now: float) -> ApiError:
    """The answer to a refused request; `now` in seconds since the epoch."""
    if refusal.reason is Reason.OUTSIDE_BLOCK:
        return outside_block(pledge, now)
    return _BUILDERS[refusal.reason](refusal, pool)


def bad_key() -> ApiError:
    return ApiError(
        401,
        "invalid_api_key",
        "Incorrect API key provided. Send your boost key (sk_pool_...) as `Authorization: Bearer` or "
        "`x-api-key`.",
    )


def pool_not_live(pool: str, status: str) -> ApiError:
    return ApiError(
        503,
        "pool_not_live",
        f"Pool {pool} is {status}, not active. Your seats are kept; try again later.",
        type="server_error",
        retry_after_s=DRAIN_RETRY_S,
    )


def outside_block(pledge: PledgeEntitlement, now: float) -> ApiError:
    start = next_opening(pledge.spans, now)
    shown = datetime.datetime.fromtimestamp(start, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    names = ", ".join(block.block.value for block in pledge.blocks)
    return ApiError(
        429,
        "outside_reserved_block",
        f"This key is valid in its reserved blocks only ({names}). The next one starts at {shown}.",
        type="rate_limit_error",
        retry_after_s=start - now,
        should_retry=False,
    )


def _rate_limit(refusal: Refusal, pool: str) -> ApiError:
    unit, kind = _LIMITS[refusal.reason]
    wait = refusal.retry_after_s or 0.0
    return ApiError(
        429,
        "rate_limit_exceeded",
        f"Rate limit reached for pool {pool} on {unit}: Limit {refusal.limit}, Used {refusal.used}, "
        f"Requested {refusal.requested}. Please try again in {wait:.3f}s.",
        type=kind,
        retry_after_s=wait,
    )


def _too_large(refusal: Refusal, pool: str) -> ApiError:
    unit, kind = _LIMITS[refusal.reason]
    return ApiError(
        429,
        "rate_limit_exceeded",
        f"Request too large for pool {pool} on {unit}: Limit {refusal.limit}, Requested "
        f"{refusal.requested}. It can never fit; make the request smaller.",
        type=kind,
        should_retry=False,
    )


def _too_wide(refusal: Refusal, pool: str) -> ApiError:
    message = f"`n` is {refusal.requested}; this node takes at most {refusal.limit}."
    return ApiError(400, None, message, param="n")


def _over_queue(refusal: Refusal, pool: str) -> ApiError:
    message = (
        f"Prompts times `n` is {refusal.requested}; at most {refusal.limit} requests of this key may wait."
    )
    return ApiError(400, None, message, param="prompt")


def _suspended(refusal: Refusal, pool: str) -> ApiError:
    return ApiError(
        402,
        "pledge_past_due",
        f"The last payment for this key's pledge in pool {pool} failed or is overdue; the key works again "
        "when it is paid.",
        type="insufficient_quota",
        should_retry=False,
    )


def _revoked(refusal: Refusal, pool: str) -> ApiError:
    return bad_key()


def _queue_full(refusal: Refusal, pool: str) -> ApiError:
    return ApiError(
        503,
        "queue_full",
        f"This key already has {refusal.used} requests queued (at most {refusal.limit}); "
        f"{refusal.requested} more do not fit.",
        type="server_error",
        retry_after_s=refusal.retry_after_s,
    )


def _queue_timeout(refusal: Refusal, pool: str) -> ApiError:
    return ApiError(
        503,
        "queue_timeout",
        "The request waited in this key's queue for the longest time allowed and was not started. Send "
        "fewer requests at once, or reserve more seats.",
        type="server_error",
        retry_after_s=refusal.retry_after_s,
    )


def _draining(refusal: Refusal, pool: str) -> ApiError:
    return ApiError(
        503,
        "draining",
        "This node is shutting down and takes no new requests.",
        type="server_error",
        retry_after_s=DRAIN_RETRY_S,
    )


_LIMITS = {
    Reason.REQUEST_LIMIT: ("requests per min (RPM)", "requests"),
    Reason.TOO_MANY: ("requests per min (RPM)", "requests"),
    Reason.TOKEN_LIMIT: ("tokens per min (TPM)", "tokens"),
    Reason.TOO_LARGE: ("tokens per min (TPM)", "tokens"),
}

_BUILDERS = {
    Reason.REQUEST_LIMIT: _rate_limit,
    Reason.TOKEN_LIMIT: _rate_limit,
    Reason.TOO_LARGE: _too_large,
    Reason.TOO_MANY: _too_large,
    Reason.TOO_WIDE: _too_wide,
    Reason.OVER_QUEUE: _over_queue,
    Reason.SUSPENDED: _suspended,
    Reason.REVOKED: _revoked,
    Reason.QUEUE_FULL: _queue_full,
    Reason.QUEUE_TIMEOUT: _queue_timeout,
    Reason.DRAINING: _draining,
}
