"""How many borrowed sequences are of use in the engine: more would only be held there."""

from __future__ import annotations

from typing import Final

from scheduler.step_rules import UNLIMITED

_MORE_THAN_ANY: Final = 4_096
"""Sequences: no engine has that many slots, so entry need not open further bit by bit."""


class BorrowedLimit:
    """Closes at once and opens bit by bit. Only the step policy changes it.

    Invariant: `most` is 1 or more.
    """

    def __init__(self, ramp_s: float) -> None:
        """`ramp_s`: seconds in which the limit may double."""
        self.most = UNLIMITED
        self._ramp_s = ramp_s
        self._from, self._since = UNLIMITED, 0.0
        """The last limit that was all there was use for, and when: from there it opens."""

    def lift(self) -> None:
        """Nothing is in the engine: whoever comes may enter."""
        self.most = UNLIMITED

    def follow(self, useful: int, now: float) -> bool:
        """Let in what is of use, or what may enter of it by `now`; whether that is all."""
        if self.most < UNLIMITED:
            doublings = min(20.0, (now - self._since) / self._ramp_s)
            ramped = int(self._from * 2.0**doublings) + 1
            if ramped < min(useful, _MORE_THAN_ANY):
                self.most = ramped
                return False
        self.most = min(UNLIMITED, max(1, useful))
        self._from, self._since = self.most, now
        return True
