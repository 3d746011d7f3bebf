"""Throughput: from a node's growing counters to sums by pledge and minute.

Each report holds counters since the boot of its serving process, and what is added is their increase
since the last stored report of that boot. Reports of a boot are stored in the order of their sequence
and each at most once, so that sending one again, or losing some, neither doubles nor loses a token.
"""

from __future__ import annotations

import datetime
import logging
import operator
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, TypeVar

from sqlalchemy import ColumnElement, Float, case, cast, delete, func, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import InstrumentedAttribute

from contract.nodes import ReportBatch
from contract.reports import SeatThroughput, ThroughputReport
from control_plane.nodes.tables import Node
from control_plane.pledges.tables import Pledge
from control_plane.throughput.tables import NodeBoot, SeatCounters, ThroughputMinute

MAX_COUNT = 10**15
"""The largest counter taken: 64 bits hold the sum of thousands of them."""
MINUTE = datetime.timedelta(minutes=1)
_MICROSECOND = datetime.timedelta(microseconds=1)
_LONGEST_SPAN = datetime.timedelta(hours=24)
_SHORT_SPAN = datetime.timedelta(seconds=10)
_MAX_AHEAD = datetime.timedelta(hours=1)
_FORGOTTEN_AFTER = datetime.timedelta(days=2)
_CLOSED = MAX_COUNT
"""As the last sequence of a boot: no report comes after it."""
_log = logging.getLogger(__name__)

Key = TypeVar("Key")


# --- amounts -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Amounts:
    """What a pledge used and got."""

    requests: int = 0
    """That entered the engine."""
    input_tokens: int = 0
    output_tokens: int = 0
    """Delivered: produced by the engine."""
    owed_seconds: int = 0
    """Whole seconds throughout which something was owed."""
    missed_seconds: int = 0
    """Of these, those that got less than 95 % of it."""
    owed_tokens: float = 0.0
    shortfall_tokens: float = 0.0
    borrowed_tokens: float = 0.0
    """Delivered beyond what was owed."""
    held_s: float = 0.0
    """Sequence-seconds for which its requests were held between steps."""

    @property
    def counts(self) -> tuple[int, int, int, int, int]:
        """The first of the values, which are whole numbers."""
        return self.requests, self.input_tokens, self.output_tokens, self.owed_seconds, self.missed_seconds

    @property
    def values(self) -> tuple[int, int, int, int, int, float, float, float, float]:
        return *self.counts, self.owed_tokens, self.shortfall_tokens, self.borrowed_tokens, self.held_s

    def __add__(self, other: Amounts) -> Amounts:
        return Amounts(*map(operator.add, self.values, other.values))

    def __sub__(self, other: Amounts) -> Amounts:
        return Amounts(*map(operator.sub, self.values, other.values))

    def part(self, elapsed: int, whole: int) -> Amounts:
        """What had come when `elapsed` of `whole` was over, had it come evenly; counts are rounded."""

        def rounded(count: int) -> int:
            return (2 * count * elapsed + whole) // (2 * whole)

        share = elapsed / whole
        part = self._each(rounded, lambda amount: amount * share)
        # Each rounded by itself, a minute could miss a second of none that it is owed.
        kept = rounded(self.owed_seconds - self.missed_seconds)
        return replace(part, owed_seconds=kept + part.missed_seconds)

    @property
    def backwards(self) -> bool:
        """As a difference of counters: one of them went down."""
        return min(self.values) < 0

    def rises(self) -> Amounts:
        """As a difference of counters: those that went up; of seconds that were not owed none is missed."""
        risen = self._each(lambda count: max(count, 0), lambda amount: max(amount, 0.0))
        return replace(risen, missed_seconds=min(risen.missed_seconds, risen.owed_seconds))

    def _each(self, of_count: Callable[[int], int], of_amount: Callable[[float], float]) -> Amounts:
        """With one function applied to what is counted, and another to what is measured."""
        values: list[Any] = [*map(of_count, self.counts), *map(of_amount, self.values[_COUNTS:])]
        return Amounts(*values)

    @classmethod
    def of(cls, row: SeatCounters | ThroughputMinute) -> Amounts:
        return cls(*(getattr(row, name) for name in _AMOUNTS))

    @classmethod
    def reported(cls, seat: SeatThroughput) -> Amounts:
        return cls(
            requests=seat.dispatched,
            input_tokens=seat.input_tokens,
            output_tokens=seat.output_tokens,
            owed_seconds=seat.owed_seconds,
            missed_seconds=seat.missed_seconds,
            owed_tokens=seat.owed_tokens,
            shortfall_tokens=seat.shortfall_tokens,
            borrowed_tokens=seat.borrowed_tokens,
            held_s=seat.held_s,
        )


_AMOUNTS = tuple(field.name for field in fields(Amounts))
_NOTHING = Amounts()
_COUNTS = len(_NOTHING.counts)


@dataclass(frozen=True, slots=True)
class Attainments:
    """Delivered over owed in windows of 1, 10 and 60 s, 0 to 1; None where nothing was owed.

    Of several windows together: the lowest, so that a good one does not hide a bad one.
    """

    attainment_1s: float | None = None
    attainment_10s: float | None = None
    attainment_60s: float | None = None

    def __or__(self, other: Attainments) -> Attainments:
        return Attainments(*(_lower(getattr(self, name), getattr(other, name)) for name in _ATTAINMENTS))

    @classmethod
    def of(cls, source: SeatThroughput | ThroughputMinute) -> Attainments:
        return cls(*(getattr(source, name) for name in _ATTAINMENTS))


_ATTAINMENTS = tuple(field.name for field in fields(Attainments))
_NOTHING_OWED = Attainments()


def _lower(one: float | None, other: float | None) -> float | None:
    return min((share for share in (one, other) if share is not None), default=None)


def spread(
    amounts: Amounts, start: datetime.datetime, end: datetime.datetime
) -> dict[datetime.datetime, Amounts]:
    """What falls to each minute that [start, end) touches, in proportion to time, where it is anything.

    Counts are differences of rounded running totals: whole, and adding up to the whole exactly.
    """
    assert start < end, "a span has a length"
    whole = (end - start) // _MICROSECOND
    parts: dict[datetime.datetime, Amounts] = {}
    given = _NOTHING
    minute = minute_of(start)
    while minute < end:
        due = amounts.part((min(minute + MINUTE, end) - start) // _MICROSECOND, whole)
        if due != given:
            parts[minute] = due - given
        given = due
        minute += MINUTE
    return parts


def span(
    previous: datetime.datetime | None, at: datetime.datetime, now: datetime.datetime
) -> tuple[datetime.datetime, datetime.datetime]:
    """The time that a report covers: from the boot's previous one (None for its first) to its own.

    Where that says nothing (no previous report, one of more than 24 h before, a clock that was set
    back) it is the last 10 s. A report from more than an hour ahead is taken for one of now.
    """
    end = now if at > now + _MAX_AHEAD else at.astimezone(datetime.UTC)
    if previous is not None and datetime.timedelta(0) < end - previous <= _LONGEST_SPAN:
        return previous, end
    return end - _SHORT_SPAN, end


def minute_of(moment: datetime.datetime) -> datetime.datetime:
    """The start of its minute."""
    return moment.replace(second=0, microsecond=0)


# --- storing -------------------------------------------------------------------------------------


async def store(
    session: AsyncSession, node: Node, batch: ReportBatch, now: datetime.datetime
) -> tuple[int, int]:
    """Add the batch's increases to the minutes; how many reports were stored, and how many duplicates.

    The node's row must be locked (`nodes.service.lock_current`): of two batches at once the second has
    to see what the first has stored. Seats of pledges that are not of the node's pool are left out.
    """
    boots = await _boots(session, node, {report.boot_id for report in batch.reports})
    known = await _pledges(session, node, batch.reports)
    minutes: defaultdict[tuple[str, datetime.datetime], Amounts] = defaultdict(Amounts)
    windows: defaultdict[tuple[str, datetime.datetime], Attainments] = defaultdict(Attainments)
    stored = 0
    for report in batch.reports:
        boot = boots.get(report.boot_id)
        if boot is None:
            boot = boots[report.boot_id] = await _begin_boot(session, node, report.boot_id, now)
        if report.sequence <= boot.row.sequence:
            continue
        start, end = span(boot.last_at, report.at, now)
        for seat in report.seats:
            if seat.pledge_id not in known:
                continue
            for minute, amounts in spread(boot.advance(session, seat), start, end).items():
                minutes[seat.pledge_id, minute] += amounts
            attainments = Attainments.of(seat)
            if attainments != _NOTHING_OWED:
                # Most of what a report tells of lies before it: that of just after a minute is of the last.
                windows[seat.pledge_id, minute_of(max(start, end - _SHORT_SPAN))] |= attainments
        boot.row.sequence, boot.row.at = report.sequence, end
        stored += 1
    await _add(session, minutes, windows)
    return stored, len(batch.reports) - stored


@dataclass(frozen=True, slots=True)
class _Boot:
    """A boot's last stored report, and the counters in it by pledge."""

    row: NodeBoot
    counters: dict[str, SeatCounters]

    @property
    def last_at(self) -> datetime.datetime | None:
        return self.row.at if self.row.sequence > 0 else None

    def advance(self, session: AsyncSession, seat: SeatThroughput) -> Amounts:
        """The increase to this report, whose counters take the old ones' place.

        Counters that went backwards have increased by nothing. They should not, but serving forgets
        seats that have long been revoked, and begins anew if one of them returns: so the lower value is
        what the next report's increase is counted from.
        """
        row = self.counters.get(seat.pledge_id)
        if row is None:
            key = {"node_id": self.row.node_id, "boot_id": self.row.boot_id, "pledge_id": seat.pledge_id}
            row = self.counters[seat.pledge_id] = SeatCounters(**key, **_columns(_NOTHING))
            session.add(row)
        before, after = Amounts.of(row), Amounts.reported(seat)
        for name, amount in _columns(after).items():
            setattr(row, name, amount)
        change = after - before
        if change.backwards:
            _log.warning(
                "node %s, boot %s: counters of pledge %s went backwards, from %s to %s",
                self.row.node_id,
                self.row.boot_id,
                seat.pledge_id,
                before,
                after,
            )
        return change.rises()


def _columns(amounts: Amounts) -> dict[str, float]:
    return dict(zip(_AMOUNTS, amounts.values, strict=True))


async def _boots(session: AsyncSession, node: Node, boot_ids: Iterable[str]) -> dict[str, _Boot]:
    """Those that have reported before."""
    boots = {
        row.boot_id: _Boot(row, {})
        for row in await session.scalars(
            select(NodeBoot).where(NodeBoot.node_id == node.id, NodeBoot.boot_id.in_(boot_ids))
        )
    }
    for counters in await session.scalars(
        select(SeatCounters).where(SeatCounters.node_id == node.id, SeatCounters.boot_id.in_(boots))
    ):
        boots[counters.boot_id].counters[counters.pledge_id] = counters
    return boots


async def _begin_boot(session: AsyncSession, node: Node, boot_id: str, now: datetime.datetime) -> _Boot:
    """Take a new boot in, and let go of the counters of those that have long been silent.

    A boot let go of is closed, not forgotten: a late report of it would be counted from zero again.
    """
    old = (NodeBoot.node_id == node.id, NodeBoot.at < now - _FORGOTTEN_AFTER, NodeBoot.sequence < _CLOSED)
    old_ids = list(await session.scalars(select(NodeBoot.boot_id).where(*old)))
    if old_ids:
        await session.execute(
            delete(SeatCounters).where(SeatCounters.node_id == node.id, SeatCounters.boot_id.in_(old_ids))
        )
        await session.execute(update(NodeBoot).where(*old).values(sequence=_CLOSED))
    row = NodeBoot(node_id=node.id, boot_id=boot_id, sequence=0, at=now)
    session.add(row)
    return _Boot(row, {})


async def _pledges(session: AsyncSession, node: Node, reports: Iterable[ThroughputReport]) -> frozenset[str]:
    """Of the pledges in the reports, those of the node's pool."""
    named = {seat.pledge_id for report in reports for seat in report.seats}
    rows = await session.scalars(
        select(Pledge.id).where(Pledge.pool_id == node.pool_id, Pledge.id.in_(named))
    )
    return frozenset(rows)


async def _add(
    session: AsyncSession,
    minutes: Mapping[tuple[str, datetime.datetime], Amounts],
    windows: Mapping[tuple[str, datetime.datetime], Attainments],
) -> None:
    """Raise the stored sums and lower the stored attainments, in one order for all, so that no two
    transactions wait for each other."""
    places = sorted(minutes.keys() | windows.keys())
    if not places:
        return
    insert = sqlite.insert if session.get_bind().dialect.name == "sqlite" else postgresql.insert
    statement = insert(ThroughputMinute)
    raised = {name: getattr(ThroughputMinute, name) + statement.excluded[name] for name in _AMOUNTS}
    lowered = {
        name: _lesser(getattr(ThroughputMinute, name), statement.excluded[name]) for name in _ATTAINMENTS
    }
    await session.execute(
        statement.on_conflict_do_update(index_elements=["pledge_id", "minute"], set_=raised | lowered),
        [
            {
                "pledge_id": pledge_id,
                "minute": minute,
                **_columns(minutes.get((pledge_id, minute), _NOTHING)),
                **asdict(windows.get((pledge_id, minute), _NOTHING_OWED)),
            }
            for pledge_id, minute in places
        ],
    )


def _lesser(stored: ColumnElement[float | None], new: ColumnElement[float | None]) -> ColumnElement[Any]:
    """Of the two; a null gives way. SQLite and PostgreSQL each have a function for it, and they differ."""
    return case((stored.is_(None), new), (new < stored, new), else_=stored)


# --- reading -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Sums:
    """Amounts over some minutes and pledges."""

    amounts: Amounts = _NOTHING
    met_tokens: float = 0.0
    """The sum of the lesser of owed and delivered, minute by minute and pledge by pledge."""
    windows: Attainments = _NOTHING_OWED
    """The lowest that reports showed in these minutes."""

    @property
    def attainment(self) -> float | None:
        """How much of what was owed was delivered, 0 to 1; None where nothing was owed.

        A minute with more than was owed does not make up for another with less.
        """
        if self.amounts.owed_tokens <= 0:
            return None
        return min(1.0, self.met_tokens / self.amounts.owed_tokens)

    def __add__(self, other: Sums) -> Sums:
        return Sums(
            self.amounts + other.amounts, self.met_tokens + other.met_tokens, self.windows | other.windows
        )

    @classmethod
    def of(cls, row: ThroughputMinute) -> Sums:
        return cls(Amounts.of(row), min(row.owed_tokens, row.output_tokens), Attainments.of(row))


def window_start(minutes: int, now: datetime.datetime) -> datetime.datetime:
    """Where the last so many minutes begin; the running one is one of them."""
    return minute_of(now) - (minutes - 1) * MINUTE


async def by_minute_of_pledge(
    session: AsyncSession, pledge_id: str, since: datetime.datetime
) -> dict[datetime.datetime, Sums]:
    """The pledge's minutes with any activity, oldest first."""
    rows = await session.scalars(
        select(ThroughputMinute)
        .where(ThroughputMinute.pledge_id == pledge_id, ThroughputMinute.minute >= since)
        .order_by(ThroughputMinute.minute)
    )
    return {row.minute: Sums.of(row) for row in rows}


async def by_minute(
    session: AsyncSession, pool_id: str, since: datetime.datetime
) -> dict[datetime.datetime, Sums]:
    """All the pool's pledges together, by minute, oldest first."""
    summed = await _summed(session, pool_id, since, ThroughputMinute.minute)
    return {minute: summed[minute] for minute in sorted(summed)}


async def by_pledge(session: AsyncSession, pool_id: str, since: datetime.datetime) -> dict[str, Sums]:
    """All minutes together, by pledge of the pool."""
    return await _summed(session, pool_id, since, ThroughputMinute.pledge_id)


async def _summed(
    session: AsyncSession, pool_id: str, since: datetime.datetime, key: InstrumentedAttribute[Key]
) -> dict[Key, Sums]:
    owed, output = ThroughputMinute.owed_tokens, cast(ThroughputMinute.output_tokens, Float)
    met = case((output < owed, output), else_=owed)
    summed = [func.sum(getattr(ThroughputMinute, name)) for name in _AMOUNTS]
    lowest = [func.min(getattr(ThroughputMinute, name)) for name in _ATTAINMENTS]
    rows = await session.execute(
        select(key, func.sum(met), *summed, *lowest)
        .join(Pledge, Pledge.id == ThroughputMinute.pledge_id)
        .where(Pledge.pool_id == pool_id, ThroughputMinute.minute >= since)
        .group_by(key)
    )
    return {
        # PostgreSQL sums its 64-bit integers as decimals.
        group: Sums(
            Amounts(*map(int, sums[:_COUNTS]), *sums[_COUNTS : -len(_ATTAINMENTS)]),
            met,
            Attainments(*sums[-len(_ATTAINMENTS) :]),
        )
        for group, met, *sums in rows
    }
