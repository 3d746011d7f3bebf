"""From serving's counters to the control plane: sampled in time, sent at least once, never blocked."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from aiohttp import web

from agent.link import Link, LinkError
from agent.options import Pace
from agent.reporter import Reporter
from agent.sampler import Glimpse, Sampler
from agent.spool import Spool
from contract.nodes import MAX_REPORTS, Enrolment, Registration
from contract.reports import ThroughputReport, parse_report
from tests.contract import documents
from tests.unit.agent.conftest import free_ports
from tests.unit.agent.control_plane_stand_in import ControlPlane


def report(sequence: int, boot_id: str = "boot") -> ThroughputReport:
    return parse_report(json.dumps(documents.report(boot_id=boot_id, sequence=sequence)))


# --- sampling ------------------------------------------------------------------------------------


class Bench:
    """A sampler, with a clock and a stats port in the test's hands."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.stats = ""
        self.readiness = (200, "ok\n")
        self.spooled: list[tuple[str, int]] = []
        self.spool_fault: Exception | None = None
        self.port = free_ports(1)[0]
        self.sampler = Sampler(self.put, Pace(report_s=10.0, look_s=1.0), wall_clock=lambda: self.now)

    def put(self, report: ThroughputReport) -> None:
        if self.spool_fault is not None:
            raise self.spool_fault
        self.spooled.append((report.boot_id, report.sequence))

    async def look(self, now: float, sequence: int, boot_id: str = "boot") -> Glimpse:
        self.now = now
        self.stats = report(sequence, boot_id).model_dump_json()
        return await self.sampler.look(self.port)

    async def answer(self, request: web.Request) -> web.Response:
        if request.path == "/readyz":
            return web.Response(status=self.readiness[0], text=self.readiness[1])
        return web.Response(text=self.stats)


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    bench = Bench()
    application = web.Application()
    application.router.add_get("/{name}", bench.answer)
    runner = web.AppRunner(application)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", bench.port).start()
    async with bench.sampler:
        yield bench
    await runner.cleanup()


async def test_newest_report_is_spooled_at_each_multiple_of_ten_seconds(bench: Bench) -> None:
    for second in range(1, 25):
        await bench.look(1000.0 + second, second)
    assert bench.spooled == [("boot", 10), ("boot", 20)]


async def test_clock_that_was_set_back_costs_no_report(bench: Bench) -> None:
    await bench.look(1009.0, 1)
    await bench.look(905.0, 2)
    assert bench.spooled == [("boot", 2)]


async def test_last_report_of_a_boot_is_spooled_once(bench: Bench) -> None:
    await bench.look(1001.0, 1)
    bench.sampler.flush()
    bench.sampler.flush()
    await bench.look(1002.0, 1, "next")
    await bench.look(1003.0, 1, "next but one")
    assert bench.spooled == [("boot", 1), ("next", 1)]


async def test_report_that_cannot_be_spooled_waits_for_the_next_time(bench: Bench) -> None:
    await bench.look(1001.0, 1)
    bench.spool_fault = sqlite3.OperationalError("disk full")
    bench.sampler.flush()
    bench.spool_fault = None
    await bench.look(1002.0, 1, "next")
    assert bench.spooled == [("boot", 1)]


async def test_glimpse_tells_readiness_and_its_reason(bench: Bench) -> None:
    assert await bench.look(1001.0, 1) == Glimpse(answered=True, ready=True, condition="ok", report=report(1))
    bench.readiness = (503, "engine dead\n")
    glimpse = await bench.look(1001.0, 1)
    assert (glimpse.answered, glimpse.ready, glimpse.condition) == (True, False, "engine dead")
    assert await bench.sampler.look(free_ports(1)[0]) == Glimpse(answered=False)


async def test_stats_of_no_use_are_told_once_and_count_as_an_answer(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.stats = '{"version": 2}'
    for _ in range(3):
        glimpse = await bench.sampler.look(bench.port)
        assert glimpse.answered
        assert glimpse.report is None
    assert caplog.text.count("serving's stats are of no use") == 1


# --- sending -------------------------------------------------------------------------------------


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Spool]:
    spool = Spool(tmp_path / "spool.db")
    yield spool
    spool.close()


@pytest.fixture
async def link(control_plane: ControlPlane) -> AsyncIterator[Link]:
    async with Link(control_plane.url, 1.0) as link:
        enrolled = await link.enrol(Enrolment(join_token=control_plane.join_token, name="test"))
        link.token = enrolled.node_token
        await link.register(Registration(boot_id="agent", base_url="http://node"))
        yield link


async def send_all(reporter: Reporter, spool: Spool, tries: int = 100) -> None:
    for _ in range(tries):
        await reporter.send_some(1)
        if not len(spool):
            return
    raise AssertionError(f"{len(spool)} reports are still there after {tries} tries")


async def test_reports_are_sent_in_order_and_in_bounded_batches(
    control_plane: ControlPlane, link: Link, spool: Spool
) -> None:
    for sequence in range(1, MAX_REPORTS + 21):
        spool.put(report(sequence))
    reporter = Reporter(spool, link)
    await send_all(reporter, spool)
    assert [len(batch) for batch in control_plane.batches] == [MAX_REPORTS, 20]
    assert [r.sequence for batch in control_plane.batches for r in batch] == list(range(1, 121))
    assert reporter.sent == 120
    assert await reporter.send_some(1) == 0


async def test_invalid_report_is_set_aside_and_all_others_are_sent(
    control_plane: ControlPlane, link: Link, spool: Spool, caplog: pytest.LogCaptureFixture
) -> None:
    for sequence in range(1, 121):
        spool.put(report(sequence))
    control_plane.poisoned = {1, 77, 120}
    reporter = Reporter(spool, link)
    await send_all(reporter, spool)
    assert {sequence for _, sequence in control_plane.reports} == set(range(1, 121)) - {1, 77, 120}
    assert reporter.set_aside == 3
    assert caplog.text.count("set aside") == 3


async def test_report_of_another_version_is_set_aside(
    control_plane: ControlPlane, link: Link, spool: Spool
) -> None:
    spool.put(report(1))
    spool.put(report(2).model_copy(update={"version": 9}))
    spool.put(report(3))
    reporter = Reporter(spool, link)
    await send_all(reporter, spool)
    assert {sequence for _, sequence in control_plane.reports} == {1, 3}
    assert reporter.set_aside == 1


@pytest.mark.parametrize(
    "refusal", [(500, "internal"), (503, "busy"), (403, "no"), (404, "no"), (429, "slow")]
)
async def test_failure_that_is_not_the_reports_own_keeps_them(
    control_plane: ControlPlane, link: Link, spool: Spool, refusal: tuple[int, str]
) -> None:
    spool.put(report(1))
    control_plane.refusals["reports"] = refusal
    reporter = Reporter(spool, link)
    with pytest.raises(LinkError):
        await reporter.send_some(1)
    assert (len(spool), reporter.set_aside) == (1, 0)


async def test_lost_answer_means_sending_again(control_plane: ControlPlane, link: Link, spool: Spool) -> None:
    spool.put(report(1))
    reporter = Reporter(spool, link)
    control_plane.garbage["reports"] = "<html>"
    with pytest.raises(LinkError):
        await reporter.send_some(1)
    assert len(control_plane.batches) == 1
    del control_plane.garbage["reports"]
    await send_all(reporter, spool)
    assert len(control_plane.batches) == 2
    assert len(control_plane.reports) == 1
