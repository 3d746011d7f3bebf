"""Looks at serving's stats port: does it answer, is it ready, what has it delivered.

What it sees goes to the spool at every whole multiple of `report_s` on the wall clock, so that the
reports of all nodes are of the same moments, and once more when a boot of serving has ended.
"""

from __future__ import annotations

import logging
import sqlite3
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import aiohttp

from agent.options import Pace
from contract.errors import ContractError
from contract.reports import ThroughputReport, parse_report

log = logging.getLogger("boosts.agent")


@dataclass(frozen=True, slots=True)
class Glimpse:
    """What one look has seen."""

    answered: bool
    ready: bool = False
    condition: str = ""
    """What serving says of itself: ok, starting, draining, engine dead."""
    report: ThroughputReport | None = None


class Sampler:
    """The newest report of the running boot, on its way to the spool.

    Invariants: a report is put into the spool at most once; the last one seen of a boot always is.
    """

    def __init__(
        self,
        put: Callable[[ThroughputReport], None],
        pace: Pace,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._put = put
        self._report_s = pace.report_s
        self._wall_clock = wall_clock
        self._slot = self._current_slot()
        self._newest: ThroughputReport | None = None
        """Not in the spool yet."""
        self._complained = ""
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=pace.look_s))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    async def look(self, stats_port: int) -> Glimpse:
        """One look, and a report into the spool if it is time. Takes `2 * look_s` at most."""
        url = f"http://127.0.0.1:{stats_port}"
        try:
            status, condition = await self._get(f"{url}/readyz")
            stats_status, stats = await self._get(f"{url}/stats")
        except (TimeoutError, aiohttp.ClientError, OSError):
            glimpse = Glimpse(answered=False)
        else:
            report = self._parsed(stats) if stats_status == 200 else None
            ready = status == 200
            said = " ".join(condition[:200].decode(errors="replace").split())
            glimpse = Glimpse(answered=True, ready=ready, condition=said, report=report)
            self._take(report)
        self._keep_time()
        return glimpse

    def flush(self) -> None:
        """Put what was seen last into the spool: there will be no more of this boot."""
        if self._newest is None:
            return
        try:
            self._put(self._newest)
        except sqlite3.Error as error:
            # The next report has this one's tokens too.
            log.error("cannot spool a report: %s", error)
        else:
            self._newest = None

    def _take(self, report: ThroughputReport | None) -> None:
        if report is None:
            return
        if self._newest is not None and report.boot_id != self._newest.boot_id:
            self.flush()
        self._newest = report

    def _keep_time(self) -> None:
        slot = self._current_slot()
        if slot != self._slot:
            self._slot = slot
            self.flush()

    def _current_slot(self) -> int:
        return int(self._wall_clock() // self._report_s)

    def _parsed(self, content: bytes) -> ThroughputReport | None:
        try:
            return parse_report(content)
        except ContractError as error:
            if str(error) != self._complained:
                log.error("serving's stats are of no use: %s", error)
                self._complained = str(error)
            return None

    async def _get(self, url: str) -> tuple[int, bytes]:
        async with self._session.get(url) as response:
            return response.status, await response.read()
