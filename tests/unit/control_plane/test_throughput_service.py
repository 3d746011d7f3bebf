"""Storing reports: each once, in order, whoever sends them and however often."""

from __future__ import annotations

import asyncio
import datetime
import logging
from dataclasses import dataclass
from typing import Any

import pytest
from sqlalchemy import func, select

from contract.nodes import ReportBatch
from contract.reports import SeatThroughput, ThroughputReport
from control_plane.database import Database
from control_plane.nodes import service as nodes
from control_plane.nodes.tables import Node
from control_plane.pledges.tables import Pledge
from control_plane.pools.tables import Pool
from control_plane.throughput import service
from control_plane.throughput.service import Amounts, Attainments
from control_plane.throughput.tables import NodeBoot, SeatCounters, ThroughputMinute
from tests.unit.control_plane.conftest import NOON, add_node, add_pledge, add_pool

SECOND = datetime.timedelta(seconds=1)
MINUTE = datetime.timedelta(minutes=1)
DAY = datetime.timedelta(days=1)


def seat(pledge_id: str, output: int, **changes: Any) -> SeatThroughput:
    """Counters of a pledge that was owed as much as it got."""
    fields: dict[str, Any] = {
        "pledge_id": pledge_id,
        "dispatched": output // 10,
        "rejected": 0,
        "evicted": 0,
        "canceled": 0,
        "input_tokens": 2 * output,
        "cached_tokens": 0,
        "output_tokens": output,
        "owed_tokens": float(output),
        "shortfall_tokens": output / 10,
        "attainment_60s": None,
        "queued": 0,
        "in_flight": 0,
    }
    return SeatThroughput(**(fields | changes))


def report(
    sequence: int, *seats: SeatThroughput, boot: str = "boot", at: datetime.datetime = NOON
) -> ThroughputReport:
    return ThroughputReport(
        version=1, boot_id=boot, sequence=sequence, at=at, entitlements_revision=1, seats=seats
    )


@dataclass
class Stage:
    database: Database
    pool: Pool
    node: Node
    pledge: Pledge

    async def send(
        self, *reports: ThroughputReport, now: datetime.datetime = NOON, node: Node | None = None
    ) -> tuple[int, int]:
        async with self.database.write() as session:
            locked = await nodes.lock_current(session, (node or self.node).id, 1)
            return await service.store(session, locked, ReportBatch(epoch=1, reports=reports), now)

    async def minutes(self) -> dict[datetime.datetime, Amounts]:
        async with self.database.read() as session:
            rows = await session.scalars(
                select(ThroughputMinute).where(ThroughputMinute.pledge_id == self.pledge.id)
            )
            return {row.minute: Amounts.of(row) for row in rows}

    async def total(self) -> Amounts:
        return sum((await self.minutes()).values(), Amounts())

    async def count(self, table: type[Any], *conditions: Any) -> int:
        async with self.database.read() as session:
            query = select(func.count()).select_from(table).where(*conditions)
            return (await session.execute(query)).scalar_one()

    def of(self, output: int) -> SeatThroughput:
        return seat(self.pledge.id, output)


@pytest.fixture
async def stage(database: Database) -> Stage:
    pool = await add_pool(database)
    node, _ = await add_node(database, pool)
    return Stage(database, pool, node, await add_pledge(database, pool, node))


async def test_counters_become_increases_by_minute(stage: Stage) -> None:
    now = NOON + 90 * SECOND
    await stage.send(report(1, stage.of(100)), now=now)
    await stage.send(
        report(2, stage.of(160), at=NOON + 30 * SECOND), report(3, stage.of(400), at=now), now=now
    )
    assert await stage.minutes() == {
        NOON - MINUTE: Amounts(10, 200, 100, 0, 0, 100.0, 10.0),
        NOON: Amounts(6 + 12, 120 + 240, 60 + 120, 0, 0, 180.0, 18.0),
        NOON + MINUTE: Amounts(12, 240, 120, 0, 0, 120.0, 12.0),
    }


async def test_borrowed_tokens_and_held_seconds_are_summed_by_minute_like_the_rest(stage: Stage) -> None:
    def more(output: int, borrowed: float, held_s: float) -> SeatThroughput:
        return seat(stage.pledge.id, output, borrowed_tokens=borrowed, held_s=held_s)

    await stage.send(report(1, more(100, 10.0, 2.0)))
    await stage.send(report(2, more(200, 40.0, 6.0), at=NOON + 2 * MINUTE), now=NOON + 2 * MINUTE)
    minutes = await stage.minutes()
    assert {minute: (part.borrowed_tokens, part.held_s) for minute, part in minutes.items()} == {
        NOON - MINUTE: (10.0, 2.0),
        NOON: (15.0, 2.0),
        NOON + MINUTE: (15.0, 2.0),
    }


async def test_seconds_owed_and_missed_are_summed_by_minute_and_old_nodes_have_none(stage: Stage) -> None:
    def counted(output: int, **seconds: int) -> SeatThroughput:
        return seat(stage.pledge.id, output, **seconds)

    await stage.send(report(1, counted(100)), report(1, counted(100, owed_seconds=9), boot="newer"))
    await stage.send(
        report(2, counted(900, owed_seconds=49, missed_seconds=2), boot="newer", at=NOON + 40 * SECOND),
        now=NOON + 40 * SECOND,
    )
    minutes = await stage.minutes()
    assert {minute: (part.owed_seconds, part.missed_seconds) for minute, part in minutes.items()} == {
        NOON - MINUTE: (9, 0),
        NOON: (40, 2),
    }
    async with stage.database.read() as session:
        [pool] = (await service.by_pledge(session, stage.pool.id, NOON - MINUTE)).values()
    assert (pool.amounts.owed_seconds, pool.amounts.missed_seconds) == (49, 2)


async def test_a_minute_keeps_the_lowest_attainment_of_each_window(stage: Stage) -> None:
    def owed(at_s: int, sequence: int, *shares: float | None) -> ThroughputReport:
        windows = dict(zip(("attainment_1s", "attainment_10s", "attainment_60s"), shares, strict=True))
        return report(sequence, seat(stage.pledge.id, 100, **windows), at=NOON + at_s * SECOND)

    # In one batch and over several; where nothing is owed, nothing is lowered. The report at the full minute
    # is of the seconds before it.
    await stage.send(owed(10, 1, 0.5, None, 1.0), owed(20, 2, 0.9, 0.75, None))
    await stage.send(owed(30, 3, None, 0.8, 0.97))
    await stage.send(owed(40, 4, 0.6, None, None))
    await stage.send(owed(60, 5, 0.4, None, None))
    await stage.send(owed(72, 6, 1.0, None, None))
    async with stage.database.read() as session:
        minutes = await service.by_minute_of_pledge(session, stage.pledge.id, NOON)
        pool = await service.by_pledge(session, stage.pool.id, NOON)
    assert {minute: sums.windows for minute, sums in minutes.items()} == {
        NOON: Attainments(0.4, 0.75, 0.97),
        NOON + MINUTE: Attainments(1.0, None, None),
    }
    assert pool[stage.pledge.id].windows == Attainments(0.4, 0.75, 0.97)


async def test_a_report_that_was_stored_or_overtaken_changes_nothing(stage: Stage) -> None:
    assert await stage.send(report(2, stage.of(100))) == (1, 0)
    before = await stage.minutes()
    assert await stage.send(report(1, stage.of(50)), report(2, stage.of(100))) == (0, 2)
    assert await stage.minutes() == before


async def test_a_lost_report_loses_no_token(stage: Stage) -> None:
    await stage.send(report(1, stage.of(100)))
    await stage.send(report(9, stage.of(1_000), at=NOON + 80 * SECOND))
    assert (await stage.total()).output_tokens == 1_000


async def test_a_new_boot_counts_from_zero(stage: Stage) -> None:
    await stage.send(report(1, stage.of(100)), report(1, stage.of(30), boot="later", at=NOON + 10 * SECOND))
    assert (await stage.total()).output_tokens == 130


async def test_a_pledge_that_comes_later_counts_from_zero_over_the_reports_own_time(stage: Stage) -> None:
    await stage.send(report(1))
    await stage.send(report(2, stage.of(100), at=NOON + 2 * MINUTE), now=NOON + 2 * MINUTE)
    assert {minute: part.output_tokens for minute, part in (await stage.minutes()).items()} == {
        NOON: 50,
        NOON + MINUTE: 50,
    }


async def test_boots_are_told_apart_by_node(stage: Stage) -> None:
    other, _ = await add_node(stage.database, stage.pool)
    await stage.send(report(5, stage.of(100)))
    assert await stage.send(report(1, stage.of(100)), node=other) == (1, 0)
    assert (await stage.total()).output_tokens == 200


async def test_counters_that_go_backwards_count_as_no_increase_and_go_on_from_there(
    stage: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    await stage.send(report(1, stage.of(100)))
    with caplog.at_level(logging.WARNING, logger=service.__name__):
        await stage.send(report(2, stage.of(10), at=NOON + 10 * SECOND))
    assert stage.pledge.id in caplog.text and "backwards" in caplog.text
    assert (await stage.total()).output_tokens == 100
    await stage.send(report(3, stage.of(25), at=NOON + 20 * SECOND))
    assert (await stage.total()).output_tokens == 115


async def test_one_counter_that_goes_backwards_does_not_hold_the_others(stage: Stage) -> None:
    await stage.send(report(1, stage.of(100)))
    await stage.send(report(2, seat(stage.pledge.id, 150, owed_tokens=1.0), at=NOON + 10 * SECOND))
    total = await stage.total()
    assert (total.output_tokens, total.owed_tokens) == (150, 100.0)


async def test_seats_that_are_not_of_the_pool_are_left_out_and_the_report_is_stored(stage: Stage) -> None:
    stranger = await add_pledge(stage.database, await add_pool(stage.database))
    batch = report(1, seat("nobody", 10), seat(stranger.id, 10), stage.of(10))
    assert await stage.send(batch) == (1, 0)
    assert await stage.count(ThroughputMinute) == 1
    assert await stage.count(SeatCounters) == 1
    assert (await stage.total()).output_tokens == 10


async def test_a_pledge_named_twice_in_a_report_counts_once(stage: Stage) -> None:
    await stage.send(report(1, stage.of(100), stage.of(100)))
    assert (await stage.total()).output_tokens == 100


async def test_reports_from_the_far_future_are_counted_when_they_come(stage: Stage) -> None:
    await stage.send(report(1, stage.of(100), at=NOON + DAY), now=NOON)
    await stage.send(report(2, stage.of(190), at=NOON + DAY), now=NOON + 90 * SECOND)
    assert {minute: part.output_tokens for minute, part in (await stage.minutes()).items()} == {
        NOON - MINUTE: 100,
        NOON: 60,
        NOON + MINUTE: 30,
    }


async def test_idle_seats_leave_no_rows(stage: Stage) -> None:
    await stage.send(report(1, stage.of(0)), report(2, stage.of(0), at=NOON + 10 * SECOND))
    assert await stage.count(ThroughputMinute) == 0


async def test_large_counters_fit(stage: Stage) -> None:
    most = service.MAX_COUNT
    await stage.send(report(1, stage.of(most)))
    await stage.send(report(1, stage.of(most), boot="later"))
    assert (await stage.total()).input_tokens == 4 * most


async def test_two_batches_at_once_do_not_count_twice(stage: Stage) -> None:
    batch = [report(number, stage.of(100 * number), at=NOON + number * SECOND) for number in range(1, 6)]
    found = await asyncio.gather(*(stage.send(*batch) for _ in range(4)))
    assert sorted(found) == [(0, 5), (0, 5), (0, 5), (5, 0)]
    assert (await stage.total()).output_tokens == 500


async def test_two_nodes_may_report_on_one_pledge_at_once(stage: Stage) -> None:
    others = [(await add_node(stage.database, stage.pool))[0] for _ in range(3)]
    pledges = [await add_pledge(stage.database, stage.pool) for _ in range(5)]
    seats = [stage.of(100), *(seat(pledge.id, 100) for pledge in pledges)]
    await asyncio.gather(
        *(
            stage.send(report(1, *(seats if index % 2 else reversed(seats))), node=node)
            for index, node in enumerate([stage.node, *others])
        )
    )
    assert (await stage.total()).output_tokens == 400


# --- old boots -----------------------------------------------------------------------------------


async def test_a_new_boot_lets_go_of_the_counters_of_boots_silent_for_two_days(stage: Stage) -> None:
    await stage.send(report(1, stage.of(100), boot="old"))
    await stage.send(report(1, stage.of(100), boot="younger", at=NOON + 2 * SECOND))
    later = NOON + 2 * DAY + SECOND
    await stage.send(report(1, stage.of(10), boot="new", at=later), now=later)
    assert await stage.count(SeatCounters, SeatCounters.boot_id == "old") == 0
    assert await stage.count(SeatCounters) == 2


async def test_without_a_new_boot_old_ones_stay(stage: Stage) -> None:
    await stage.send(report(1, stage.of(100), boot="old"), report(1, stage.of(100)))
    later = NOON + 9 * DAY
    await stage.send(report(2, stage.of(110), at=later), now=later)
    assert await stage.count(SeatCounters) == 2


async def test_a_late_report_of_a_boot_let_go_of_is_a_duplicate_not_counted_anew(stage: Stage) -> None:
    await stage.send(report(1, stage.of(100), boot="old"))
    later = NOON + 3 * DAY
    await stage.send(report(1, stage.of(10), boot="new", at=later), now=later)
    assert await stage.send(report(2, stage.of(120), boot="old", at=later), now=later) == (0, 1)
    assert (await stage.total()).output_tokens == 110


async def test_a_boot_that_speaks_in_the_same_batch_as_a_new_one_is_not_old(stage: Stage) -> None:
    """The control plane was away for three days: the spool brings the old boot's end, then the new boot."""
    await stage.send(report(1, stage.of(100), boot="old"))
    later = NOON + 3 * DAY
    await stage.send(
        report(9, stage.of(900), boot="old", at=later - DAY),
        report(1, stage.of(10), boot="new", at=later - DAY + MINUTE),
        now=later,
    )
    assert await stage.count(NodeBoot, NodeBoot.sequence == 9) == 1
    assert (await stage.total()).output_tokens == 910
