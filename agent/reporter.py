"""Sends what is spooled, in order, and forgets it when the control plane has it."""

from __future__ import annotations

import logging

from agent.link import Link, RefusedError
from agent.spool import Spool, Spooled
from contract.errors import ContractError
from contract.nodes import MAX_REPORTS, ReportBatch
from contract.reports import ThroughputReport, parse_report

MAX_BATCH_BYTES = 2 * 1024 * 1024
_INVALID = frozenset({400, 413, 422})
"""Refusals of what was sent. Others, a 403 or 404 say, are about the way there, and pass."""

log = logging.getLogger("boosts.agent")


class Reporter:
    """At least once: a batch leaves the spool only after the answer.

    A batch that is refused as invalid is halved until the one report that is at fault stands alone.
    """

    def __init__(self, spool: Spool, link: Link) -> None:
        self.sent = 0
        self.set_aside = 0
        self._spool = spool
        self._link = link
        self._limit = MAX_REPORTS

    async def send_some(self, epoch: int) -> int:
        """Send the oldest reports; how many were taken. Raises LinkError, and sqlite3.Error."""
        batch = self._readable(self._spool.oldest(self._limit, MAX_BATCH_BYTES))
        if not batch:
            return 0
        reports = tuple(report for _, report in batch)
        try:
            await self._link.report(ReportBatch(epoch=epoch, reports=reports))
        except RefusedError as error:
            if error.status not in _INVALID:
                raise
            if len(batch) == 1:
                self._set_aside(batch[0][0], str(error))
            self._limit = max(1, len(batch) // 2)
            return 0
        self._spool.remove([spooled for spooled, _ in batch])
        self.sent += len(batch)
        self._limit = min(MAX_REPORTS, 2 * self._limit)
        return len(batch)

    def _readable(self, batch: list[Spooled]) -> list[tuple[Spooled, ThroughputReport]]:
        readable = []
        for spooled in batch:
            try:
                readable.append((spooled, parse_report(spooled.document)))
            except ContractError as error:
                # An agent of another version wrote it.
                self._set_aside(spooled, str(error))
        return readable

    def _set_aside(self, spooled: Spooled, reason: str) -> None:
        self._spool.set_aside(spooled, reason)
        self.set_aside += 1
        log.error("a report was refused and set aside in spool.db, table `refused`: %s", reason)
