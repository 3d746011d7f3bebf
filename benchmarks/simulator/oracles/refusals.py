"""Refusals and evictions: only for a reason that holds, with a time to retry that is kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmarks.simulator import trace
from benchmarks.simulator.oracles.oracle import Oracle
from benchmarks.simulator.oracles.view import EPSILON, SeatView, View


class HonestRefusals(Oracle):
    """Refused only for a reason that holds; admitted only within the limits; a retry on time is admitted."""

    name = "honest refusals"
    foresees = (
        trace.Refused,
        trace.Queued,
        trace.Evicted,
    )

    def __init__(self) -> None:
        self._promised_retries: dict[tuple[float, str, tuple[tuple[int, int, int], ...]], int] = {}
        """By time of the retry, seat and sizes: the seat's change count at the refusal."""

    def foresee(self, event: trace.Event, view: View) -> Iterator[str]:
        match event:
            case trace.Refused():
                yield from self._refusal(event, view)
            case trace.Queued():
                reasons = self._reasons(event.seat_id, event.prompts, event.at, view, slack=-EPSILON)
                if reasons:
                    yield f"admitted although {sorted(reasons)}"
            case trace.Evicted():
                yield from self._eviction(event, view)

    def _refusal(self, event: trace.Refused, view: View) -> Iterator[str]:
        # Within a hair of a limit both answers are right.
        reasons = self._reasons(event.seat_id, event.prompts, event.at, view, slack=EPSILON)
        if event.reason not in reasons:
            yield f"{event.seat_id} refused for {event.reason}, true would be {sorted(reasons)}"
        seat = view.seats[event.seat_id]
        sizes = tuple((p.input_tokens, p.max_tokens, p.count) for p in event.prompts)
        promised = self._promised_retries.pop((event.at, event.seat_id, sizes), None)
        if promised == seat.changes:
            yield f"{event.seat_id} came back on time and was refused for {event.reason}"
        limits = {"request_limit", "token_limit"}
        if reasons and reasons <= limits:
            if event.retry_after_s is None:
                yield f"{event.seat_id} hit {event.reason} and was not told when to retry"
            else:
                needed = self._wait_s(seat, event.prompts, view)
                if abs(event.retry_after_s - needed) > EPSILON * 60:
                    yield f"{event.seat_id} told to wait {event.retry_after_s} s, it takes {needed} s"
                retry_at = event.at + event.retry_after_s
                self._promised_retries[retry_at, event.seat_id, sizes] = seat.changes

    @staticmethod
    def _wait_s(seat: SeatView, prompts: Sequence[trace.Prompt], view: View) -> float:
        """Seconds until both limits would admit the request."""
        count = sum(prompt.count for prompt in prompts)
        tokens = view.reservation(prompts, seat.terms.tpm_limit)
        return max(
            (count - seat.requests.level) * 60.0 / seat.terms.rpm_limit,
            (tokens - seat.tokens.level) * 60.0 / seat.terms.tpm_limit,
        )

    @staticmethod
    def _eviction(event: trace.Evicted, view: View) -> Iterator[str]:
        prompt = view.prompts[event.number]
        waited = event.at - prompt.submitted_at
        if event.reason == "queue_timeout" and waited < view.promised.queue_timeout_s - EPSILON:
            yield f"prompt {event.number} timed out after {waited} s"
        if event.reason == "outside_block" and view.seats[prompt.prompt.seat_id].open:
            yield f"prompt {event.number} evicted inside its block"

    @staticmethod
    def _reasons(
        seat_id: str, prompts: Sequence[trace.Prompt], at: float, view: View, *, slack: float
    ) -> set[str]:
        """Every reason for which the request may be refused, each limit less `slack` of itself."""
        seat = view.seats[seat_id]
        terms = seat.terms
        count = sum(prompt.count for prompt in prompts)
        bound = view.promised.max_queued_per_seat * terms.quantity
        seat.requests.add(0, at)
        seat.tokens.add(0, at)
        tokens = view.reservation(prompts, terms.tpm_limit)
        holds = {
            "outside_block": not seat.open,
            "too_wide": max(prompt.count for prompt in prompts) > view.slots,
            "too_many": count > terms.rpm_limit,
            "over_queue": count > bound,
            "too_large": sum(prompt.input_tokens + prompt.count for prompt in prompts) > terms.tpm_limit,
            "queue_full": seat.waiting + count > bound,
            "request_limit": seat.requests.level < count + slack * terms.rpm_limit,
            "token_limit": seat.tokens.level < tokens + slack * terms.tpm_limit,
        }
        return {reason for reason, true in holds.items() if true}


class QueueTimeout(Oracle):
    """Nothing waits longer than the queue timeout."""

    name = "queue timeout"
    sees = (trace.Settled,)

    def see(self, event: trace.Event, view: View) -> Iterator[str]:
        if not isinstance(event, trace.Settled):
            return
        for _, head in view.heads():
            waited = event.at - view.prompts[head.number].submitted_at
            if waited > view.promised.queue_timeout_s + EPSILON:
                yield f"prompt {head.number} has waited {waited} s"
