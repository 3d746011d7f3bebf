"""What seats are owed per second, how far each is ahead or behind, and how long steps may take for it."""

from __future__ import annotations

from typing import Final

from scheduler.step_rules import StepRules
from scheduler.streams import StepSeat

_HORIZON_TOKENS: Final = 4.0


class Paces:
    """The rates of the seats with owed decodes. Only the step policy changes it."""

    def __init__(self, rules: StepRules) -> None:
        self._rules = rules
        self.needed: dict[StepSeat, float] = {}
        """The rate that each seat with owed decodes should get, tokens per second, by the last review."""
        self.least_lead_s = 0.0
        """Of the seat that is furthest behind, in time of its rate; 0 if nobody is."""

    def begin(self) -> None:
        """A review begins, which will `follow` every seat."""
        self.needed, self.least_lead_s = {}, 0.0

    def follow(self, seat: StepSeat, decoded: int, now: float) -> None:
        """Bring the seat's lead up to `now`, after so many tokens more, and say what it needs from now on."""
        rules = self._rules
        if seat.counted_at is not None:
            # By the rate that was owed until now.
            lead = seat.lead + decoded - self._aim(seat.rate) * (now - seat.counted_at)
            # A token more or less is neither lead nor lag.
            most, least = max(1.0, seat.rate * rules.kept_lead_s), max(1.0, seat.rate * rules.kept_lag_s)
            seat.lead = max(-least, min(most, lead))
        seat.rate = seat.guarantee_tok_s * seat.owing()
        if seat.rate > 0.0:
            seat.counted_at = now
            self.least_lead_s = min(self.least_lead_s, seat.lead / seat.rate)
        else:
            seat.counted_at, seat.lead = None, 0.0
        if paced := seat.paced():
            rate = seat.guarantee_tok_s * paced
            horizon_s = max(rules.horizon_s, _HORIZON_TOKENS / rate)
            self.needed[seat] = max(0.5 * rate, self._aim(rate) - seat.lead / horizon_s)

    def longest_s(self) -> float:
        """The longest step that brings every seat what it needs, with the decodes that take part."""
        longest_s = float("inf")
        for seat, rate in self.needed.items():
            longest_s = min(longest_s, (seat.decoding - seat.held) / rate)
        return longest_s

    def longest_without_leads_s(self) -> float:
        """The longest step that brings every seat its pace, whatever its lead."""
        longest_s = float("inf")
        for seat in self.needed:
            aim = self._aim(seat.guarantee_tok_s * seat.paced())
            longest_s = min(longest_s, (seat.decoding - seat.held) / aim)
        return longest_s

    def _aim(self, rate: float) -> float:
        """Tokens per second that a seat shall get, a little more than it is owed."""
        return rate + max(self._rules.margin * rate, self._rules.margin_tok_s)
