"""Whether a seat may submit a request now: its size, its request and token limits, its queue's room.

Nothing is debited here. Waits are in seconds; limits per minute as the seat was sold them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from scheduler.buckets import TokenBucket
from scheduler.seats import Seat
from scheduler.terms import Ask, Policy
from scheduler.tickets import Reason, Refusal


class Limits:
    """The limits of all seats, by the node's policy. A refusal names the longest wait of all that refuse."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    def refusal(self, seat: Seat, asks: Sequence[Ask], slots: int, now: float) -> Refusal | None:
        """Why a request, all of its prompts or none, may not be queued where there are so many slots."""
        never = self._size_refusal(seat, asks, slots)
        if never is not None:
            return never
        count = sum(ask.count for ask in asks)
        return _longest(
            (
                self._request_limit_refusal(seat, count, now),
                self._token_limit_refusal(seat, asks, now),
                self._queue_refusal(seat, count),
            )
        )

    def foreseen(self, seat: Seat, now: float, *, queues: bool) -> Refusal | None:
        """Why no request may be queued, whatever its size; `queues` is whether one would have to wait."""
        return _longest(
            (
                self._request_limit_refusal(seat, 1, now),
                self._queue_refusal(seat, 1) if queues else None,
            )
        )

    def reserves(self, seat: Seat, asks: Sequence[Ask]) -> list[int]:
        """Tokens to take from the token limit for each prompt, together never more than the limit: a
        request whose expected output overshoots it may still be short, so it reserves all there is."""
        left = seat.terms.tpm_limit
        reserves = []
        for ask in asks:
            reserves.append(min(left, ask.input_tokens + seat.expected(ask.count, ask.max_tokens)))
            left -= reserves[-1]
        return reserves

    def queue_wait_s(self, seat: Seat) -> float:
        """Seconds until a place in the seat's queue should be free, by its recent pace."""
        return min(max(seat.dispatch_gap_s, 1.0), self._policy.queue_timeout_s)

    def _size_refusal(self, seat: Seat, asks: Sequence[Ask], slots: int) -> Refusal | None:
        """What no amount of waiting would make fit."""
        count = sum(ask.count for ask in asks)
        sizes = (
            (Reason.TOO_WIDE, max(ask.count for ask in asks), slots),
            (Reason.TOO_MANY, count, seat.terms.rpm_limit),
            (Reason.OVER_QUEUE, count, self._queue_bound(seat)),
            (Reason.TOO_LARGE, sum(a.input_tokens + a.count for a in asks), seat.terms.tpm_limit),
        )
        for reason, requested, limit in sizes:
            if requested > limit:
                return Refusal(reason, limit=limit, requested=requested)
        return None

    @staticmethod
    def _request_limit_refusal(seat: Seat, count: int, now: float) -> Refusal | None:
        wait = seat.requests.wait_s(count, now)
        if wait == 0:
            return None
        return _limit_refusal(Reason.REQUEST_LIMIT, seat.requests, count, wait, now)

    def _token_limit_refusal(self, seat: Seat, asks: Sequence[Ask], now: float) -> Refusal | None:
        tokens = sum(self.reserves(seat, asks))
        wait = seat.tokens.wait_s(tokens, now)
        if wait == 0:
            return None
        return _limit_refusal(Reason.TOKEN_LIMIT, seat.tokens, tokens, wait, now)

    def _queue_refusal(self, seat: Seat, count: int) -> Refusal | None:
        bound = self._queue_bound(seat)
        if seat.waiting + count <= bound:
            return None
        wait = self.queue_wait_s(seat)
        return Refusal(Reason.QUEUE_FULL, wait, limit=bound, used=seat.waiting, requested=count)

    def _queue_bound(self, seat: Seat) -> int:
        return self._policy.max_queued_per_seat * seat.terms.quantity


def _longest(refusals: Iterable[Refusal | None]) -> Refusal | None:
    """The first of them, with the longest wait: a retry is admitted once all that refuses it has passed."""
    standing = [refusal for refusal in refusals if refusal is not None]
    if not standing:
        return None
    return replace(standing[0], retry_after_s=max(refusal.retry_after_s or 0.0 for refusal in standing))


def _limit_refusal(reason: Reason, bucket: TokenBucket, requested: float, wait: float, now: float) -> Refusal:
    used = round(bucket.limit - bucket.level(now))
    return Refusal(reason, wait, limit=bucket.limit, used=used, requested=round(requested))
