"""Block arithmetic: the three fixed UTC spans of a day, and when a set of them is open.

Times are seconds since the epoch, UTC; a UTC day has 86,400 of them here (leap seconds do not exist
in POSIX time).
"""

from __future__ import annotations

import enum
import re
from collections.abc import Sequence
from dataclasses import dataclass

DAY_S = 86_400
BORDER_GRACE_S = 2.0
"""At a border the seat that ends is honoured this much longer, so that there is never nobody."""

_CLOCK = re.compile(r"(\d\d):(\d\d)(?::(\d\d))?")


class Block(enum.Enum):
    """A block of the day, by its first UTC hour."""

    NIGHT = "night"
    EUROPE = "europe"
    AMERICAS = "americas"

    @property
    def first_hour(self) -> int:
        return list(Block).index(self) * 8

    @property
    def span(self) -> DaySpan:
        return DaySpan(self.first_hour * 3600, (self.first_hour + 8) * 3600)


@dataclass(frozen=True, slots=True)
class DaySpan:
    """A span of each UTC day: from second `start_s` up to, not including, second `end_s`."""

    start_s: int
    end_s: int

    def __post_init__(self) -> None:
        if not 0 <= self.start_s < self.end_s <= DAY_S:
            raise ValueError(f"a block must start before it ends, within one UTC day: {self}")


def parse_clock(text: str) -> int:
    """Seconds since midnight of `HH:MM` or `HH:MM:SS`; `24:00` ends a day. Raises ValueError."""
    match = _CLOCK.fullmatch(text)
    if match is None:
        raise ValueError(f"not a time of day: {text!r} (want HH:MM or HH:MM:SS)")
    hours, minutes, seconds = (int(part or 0) for part in match.groups())
    total = hours * 3600 + minutes * 60 + seconds
    if minutes > 59 or seconds > 59 or total > DAY_S:
        raise ValueError(f"not a time of day: {text!r}")
    return total


def format_clock(second_of_day: int) -> str:
    """`HH:MM:SS`, the inverse of `parse_clock`."""
    return f"{second_of_day // 3600:02}:{second_of_day // 60 % 60:02}:{second_of_day % 60:02}"


def is_open(spans: Sequence[DaySpan], now: float) -> bool:
    """Whether one of the spans covers `now`, the grace after its end included."""
    second = now % DAY_S
    return any(
        span.start_s <= second < span.end_s + BORDER_GRACE_S
        # A span that ends at midnight has its grace in the next day's first seconds.
        or second + DAY_S < span.end_s + BORDER_GRACE_S
        for span in spans
    )


def next_opening(spans: Sequence[DaySpan], now: float) -> float:
    """The first start of a span after `now`, in seconds since the epoch. Raises ValueError without spans."""
    midnight = now - now % DAY_S
    starts = [midnight + span.start_s for span in spans]
    return min(start if start > now else start + DAY_S for start in starts)


def next_border(spans: Sequence[DaySpan], now: float) -> float:
    """When `is_open` may change next, in seconds since the epoch. Raises ValueError without spans."""
    midnight = now - now % DAY_S
    borders = [
        border
        for span in spans
        for day in (midnight - DAY_S, midnight, midnight + DAY_S)
        for border in (day + span.start_s, day + span.end_s + BORDER_GRACE_S)
    ]
    return min(border for border in borders if border > now)
