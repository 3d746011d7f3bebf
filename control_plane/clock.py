"""Where the control plane's time comes from: one function, so that a test can own it."""

from __future__ import annotations

import datetime
from collections.abc import Callable

Clock = Callable[[], datetime.datetime]
"""Now, with UTC as its zone."""


def system_clock() -> datetime.datetime:
    """The machine's clock."""
    return datetime.datetime.now(datetime.UTC)


def add_months(start: datetime.datetime, months: int) -> datetime.datetime:
    """The same day and time `months` later; the month's last day where it has no such day.

    Count from the first period's start, not from the last one's, or the 31st becomes the 28th for ever.
    """
    years, month = divmod(start.month - 1 + months, 12)
    first = start.replace(year=start.year + years, month=month + 1, day=1)
    last_day = (first + datetime.timedelta(days=31)).replace(day=1) - datetime.timedelta(days=1)
    return first.replace(day=min(start.day, last_day.day))


def iso(moment: datetime.datetime) -> str:
    """As the pools API shows times: `2026-05-04T00:00:00.000Z`."""
    return moment.astimezone(datetime.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
