"""The ledger of one seat: output tokens it was owed and output tokens the engine made for it.

A pledge of q seats with guarantee g is owed tokens at rate `min(q*g, g*m(t))`, where m(t) counts its
unfinished requests that are past their first token or past its deadline. The span during which m > 0
is a busy period; the promise is `delivered >= owed - g*q*T0` inside each, and nothing carries over
from one to the next. Attainment is delivered over owed, capped at 1 per window. A token that finds
nothing owed and undelivered is *borrowed*.

Tokens are booked at the time at which the engine made them, which may lie behind the ledger's own: the
engine is another process.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

WINDOWS_S = (1, 10, 60)
"""Of the first it is the lowest one of late that is told, of the others the last."""
_SETTLE_S = 0.5
"""The windows end at the last whole second that is over for this long, so that its tokens are in."""
_KEPT_S = max(WINDOWS_S) + 2
_LOOKED_BACK_S = 12
"""Seconds of which the lowest is told: who looks every 10 s, as reports do, misses none."""
_WHOLE = 0.999
_MET_FROM = 0.95
"""A second is missed if less than this share of what was owed in it was delivered."""


@dataclass(slots=True)
class _Second:
    index: int = -1
    owing_s: float = 0.0
    owed: float = 0.0
    delivered: int = 0


class Ledger:
    """Owed and delivered, token by token.

    Invariants: `owed`, `delivered` and what `seconds` counts only grow; `rate` is `min(q*g, g*m)`; the
    deadlines kept are those of unfinished requests without a first token, so their number is bounded by the
    seat's queue and the engine's slots. Seconds are whole seconds of the caller's clock.
    """

    def __init__(self, guarantee_tok_s: float, quantity: int, now: float) -> None:
        self._guarantee = guarantee_tok_s
        self._quantity = quantity
        self._at = now
        self._owing = 0
        self._waiting: dict[int, tuple[float, int]] = {}
        self._deadlines: list[tuple[float, int]] = []
        self._seconds = [_Second() for _ in range(_KEPT_S)]
        self._judged = -1
        """The second up to which `seconds` has counted."""
        self._owed_seconds = 0
        self._missed_seconds = 0
        self._period_owed = 0.0
        self._period_delivered = 0
        self._due = 0.0
        self.owed = 0.0
        """Tokens promised since the ledger began."""
        self.delivered = 0
        """Tokens made since the ledger began."""
        self.borrowed = 0.0
        """Of these, tokens that were not due when they came."""
        self.shortfall = 0.0
        """Tokens owed and not delivered by the end of their busy period."""

    @property
    def rate(self) -> float:
        """Tokens per second owed at this moment."""
        return self._guarantee * min(self._quantity, self._owing)

    @property
    def behind(self) -> float:
        """Tokens by which delivery lags in the running busy period; the promise bounds it by g*q*T0."""
        return max(0.0, self._period_owed - self._period_delivered)

    def set_terms(self, guarantee_tok_s: float, quantity: int, now: float) -> None:
        """Change what is owed from `now` on (0 at a block's end)."""
        self.advance(now)
        self._guarantee = guarantee_tok_s
        self._quantity = quantity

    def expect(self, number: int, count: int, deadline: float) -> None:
        """Request `number` of `count` sequences is unfinished; its first token is due by `deadline`."""
        self._waiting[number] = (deadline, count)
        heapq.heappush(self._deadlines, (deadline, number))

    def first_token(self, number: int, now: float) -> None:
        """The request has its first token: from here on it is owed its rate."""
        self.advance(now)
        waiting = self._waiting.pop(number, None)
        if waiting is not None:
            self._owing += waiting[1]
        self._drop_answered_deadlines()

    def deliver(self, tokens: int, now: float) -> None:
        """The engine made `tokens` output tokens for the seat."""
        self.advance(now)
        self.delivered += tokens
        self._second(int(now)).delivered += tokens
        paid = min(self._due, tokens)
        self._due -= paid
        self.borrowed += tokens - paid
        if self._owing:
            self._period_delivered += tokens

    def end(self, number: int, count: int, now: float) -> None:
        """Request `number` is unfinished no longer, however it ended."""
        self.advance(now)
        if self._waiting.pop(number, None) is None:
            self._owing -= count
            if self._owing == 0:
                self._close_period()
        self._drop_answered_deadlines()

    def advance(self, now: float) -> None:
        """Let the owed tokens grow up to `now`, deadlines on the way included."""
        while self._deadlines and self._deadlines[0][0] <= now:
            deadline, number = heapq.heappop(self._deadlines)
            waiting = self._waiting.pop(number, None)
            if waiting is not None:
                self._owe_until(max(deadline, self._at))
                self._owing += waiting[1]
        self._owe_until(now)

    def attainment(self, window_s: int, now: float) -> float | None:
        """Delivered over owed in the last `window_s` whole seconds that have settled, at most 1; None if
        nothing was owed."""
        self.advance(now)
        last = int(now - _SETTLE_S) - 1
        owed, delivered = 0.0, 0
        for second in self._seconds:
            if last - window_s < second.index <= last:
                owed += second.owed
                delivered += second.delivered
        return min(1.0, delivered / owed) if owed > 0 else None

    def lowest_second(self, now: float) -> float | None:
        """The lowest attainment of a whole second of late. Only seconds count throughout which something was
        owed: in a part of one a token more or less decides. None if there is none."""
        self.advance(now)
        last = _last_final(now)
        shares = [
            min(1.0, second.delivered / second.owed)
            for second in self._seconds
            if last - _LOOKED_BACK_S < second.index <= last and second.owing_s > _WHOLE
        ]
        return min(shares, default=None)

    def seconds(self, now: float) -> tuple[int, int]:
        """Whole seconds since the ledger began throughout which something was owed, and of these the missed
        ones. They are counted when looked at and before they are forgotten: tokens pay nothing for it."""
        self.advance(now)
        last = _last_final(now)
        for second in self._seconds:
            if self._judged < second.index <= last:
                self._judge(second)
        self._judged = max(self._judged, last)
        return self._owed_seconds, self._missed_seconds

    def _owe_until(self, now: float) -> None:
        rate = self.rate
        if rate > 0:
            while self._at < now:
                index = int(self._at)
                until = min(now, index + 1.0)
                owed = rate * (until - self._at)
                second = self._second(index)
                second.owing_s += until - self._at
                second.owed += owed
                self._period_owed += owed
                self._due += owed
                self.owed += owed
                self._at = until
        self._at = max(self._at, now)

    def _second(self, index: int) -> _Second:
        second = self._seconds[index % _KEPT_S]
        if second.index != index:
            if second.index > self._judged:
                self._judge(second)
            second.index, second.owing_s, second.owed, second.delivered = index, 0.0, 0.0, 0
        return second

    def _judge(self, second: _Second) -> None:
        if second.owing_s > _WHOLE:
            self._owed_seconds += 1
            # Rounded, since what is owed is a sum of fractions and just enough tokens are enough.
            self._missed_seconds += second.delivered < round(_MET_FROM * second.owed, 6)

    def _close_period(self) -> None:
        self.shortfall += self.behind
        self._period_owed = 0.0
        self._period_delivered = 0
        self._due = 0.0

    def _drop_answered_deadlines(self) -> None:
        while self._deadlines and self._deadlines[0][1] not in self._waiting:
            heapq.heappop(self._deadlines)
        if len(self._deadlines) > 2 * len(self._waiting) + 16:
            self._deadlines = [(due, number) for number, (due, _) in self._waiting.items()]
            heapq.heapify(self._deadlines)


def _last_final(now: float) -> int:
    """The last whole second of which all tokens are in. What is told of it stays told, so it comes later than
    the windows."""
    return int(now - 2 * _SETTLE_S) - 1
