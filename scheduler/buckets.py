"""Counting against the clock: the request and token limits of a key, and how often something happens."""

from __future__ import annotations

import math


class TokenBucket:
    """A bucket that refills at `limit` units a minute and holds at most `limit`.

    Invariants: the level never exceeds the limit. It may go below zero when a settled request used
    more than it had reserved; the debt is refilled like anything else.
    """

    __slots__ = ("_at", "_level", "limit")

    def __init__(self, limit: int, now: float) -> None:
        self.limit = limit
        self._level = float(limit)
        self._at = now

    def level(self, now: float) -> float:
        """Units that could be taken at `now`."""
        return min(self.limit, self._level + max(0.0, now - self._at) * self.limit / 60.0)

    def wait_s(self, units: float, now: float) -> float:
        """Seconds until `units` could be taken: 0 if now, `inf` if never."""
        if units > self.limit:
            return math.inf
        missing = units - self.level(now)
        # A hair of slack, but not in the wait: a retry exactly on time must not fail on the last bits of
        # its clock, which weigh as much as the limit is high.
        return missing * 60.0 / self.limit if missing > 1e-9 * self.limit else 0.0

    def take(self, units: float, now: float) -> None:
        """Take `units`; the caller has seen that they are there."""
        self._level = self.level(now) - units
        self._at = now

    def give_back(self, units: float, now: float) -> None:
        """Return what was taken too much; a negative amount takes what was reserved too little."""
        self._level = min(self.limit, self.level(now) + units)
        self._at = now

    def resize(self, limit: int, now: float) -> None:
        """Change the limit, keeping what is in use in use."""
        in_use = self.limit - self.level(now)
        self.limit = limit
        self._level = limit - in_use
        self._at = now

    def seconds_to_full(self, now: float) -> float:
        """Seconds until nothing of the limit is in use any more."""
        return (self.limit - self.level(now)) * 60.0 / self.limit


class RecentRate:
    """How many a second, of late: a mean that forgets in about `memory_s`."""

    def __init__(self, memory_s: float) -> None:
        self._memory_s = memory_s
        self._per_s = 0.0
        self._at = 0.0

    def count(self, number: int, now: float) -> None:
        self._per_s = self.per_s(now) + number / self._memory_s
        self._at = now

    def per_s(self, now: float) -> float:
        return self._per_s * math.exp(min(0.0, self._at - now) / self._memory_s)
