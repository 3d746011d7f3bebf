"""Reports that the control plane does not have yet, on disk: first in, first out.

Bounded without losing a token: counters are cumulative, so a full spool is thinned. Of the older half
every second report goes, but never the first or the last of a boot; what is lost is resolution in time.
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
from collections import Counter
from collections.abc import Sequence, Set
from pathlib import Path
from typing import NamedTuple

from contract.reports import ThroughputReport

MAX_SPOOLED = 10_000
"""A little more than a day, at one report every 10 s."""
MAX_REFUSED = 1_000

log = logging.getLogger("boosts.agent")

_TABLES = """
CREATE TABLE IF NOT EXISTS reports (
    number INTEGER PRIMARY KEY AUTOINCREMENT, boot_id TEXT NOT NULL, document TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS refused (
    number INTEGER PRIMARY KEY AUTOINCREMENT, reason TEXT NOT NULL, document TEXT NOT NULL);
"""


class Spooled(NamedTuple):
    """One report, waiting."""

    number: int
    document: str


class Spool:
    """A queue in an SQLite file. Its methods may raise sqlite3.Error, and take milliseconds."""

    def __init__(self, path: Path, *, bound: int = MAX_SPOOLED) -> None:
        self._bound = bound
        try:
            self._database = _open(path)
        except sqlite3.OperationalError:
            # A full disk, a lock: nothing that a new file would mend.
            raise
        except sqlite3.DatabaseError as error:
            aside = path.with_suffix(".damaged")
            log.error("%s is damaged (%s): kept as %s, and begun anew", path, error, aside.name)
            path.replace(aside)
            for leftover in ("-wal", "-shm"):
                path.with_name(path.name + leftover).unlink(missing_ok=True)
            self._database = _open(path)
        self._count = self._counted()

    def __len__(self) -> int:
        return self._count

    def put(self, report: ThroughputReport) -> None:
        """Add the newest report."""
        with self._database:
            self._database.execute(
                "INSERT INTO reports (boot_id, document) VALUES (?, ?)",
                (report.boot_id, report.model_dump_json()),
            )
            if self._counted() > self._bound:
                self._thin()
        self._count = self._counted()

    def oldest(self, limit: int, max_bytes: int) -> list[Spooled]:
        """The reports to send next: `limit` of them, or fewer where they are large; one at least."""
        found: list[Spooled] = []
        size = 0
        query = "SELECT number, document FROM reports ORDER BY number LIMIT ?"
        with contextlib.closing(self._database.execute(query, (limit,))) as rows:
            for spooled in map(Spooled._make, rows):
                size += len(spooled.document)
                if found and size > max_bytes:
                    break
                found.append(spooled)
        return found

    def remove(self, spooled: Sequence[Spooled]) -> None:
        """Forget reports that the control plane has."""
        with self._database:
            self._delete([number for number, _ in spooled])
        self._count = self._counted()

    def set_aside(self, spooled: Spooled, reason: str) -> None:
        """Take a report that will never be accepted out of the way of the others, and keep it to look at."""
        with self._database:
            self._delete([spooled.number])
            self._database.execute(
                "INSERT INTO refused (reason, document) VALUES (?, ?)", (reason, spooled.document)
            )
            self._database.execute(
                "DELETE FROM refused WHERE number <= (SELECT max(number) FROM refused) - ?", (MAX_REFUSED,)
            )
        self._count = self._counted()

    def close(self) -> None:
        self._database.close()

    def _counted(self) -> int:
        count: int = self._database.execute("SELECT count(*) FROM reports").fetchone()[0]
        return count

    def _thin(self) -> None:
        rows = self._database.execute("SELECT number, boot_id FROM reports ORDER BY number").fetchall()
        last = {boot_id: number for number, boot_id in rows}
        first = {boot_id: number for number, boot_id in reversed(rows)}
        ends = {*first.values(), *last.values()}
        surplus = (
            _every_second(rows[: len(rows) // 2], but=ends)
            # Many short boots: first the newer half, then what has a later report of its boot.
            or _every_second(rows, but=ends)
            or _every_second(rows, but=set(last.values()))
        )
        if not surplus:
            log.error("the spool is full of boots with one report each: dropped the oldest")
            surplus = [rows[0][0]]
        self._delete(surplus)

    def _delete(self, numbers: Sequence[int]) -> None:
        self._database.executemany("DELETE FROM reports WHERE number = ?", [(number,) for number in numbers])


def _every_second(rows: Sequence[tuple[int, str]], *, but: Set[int]) -> list[int]:
    """Of each boot, every second report that is not among `but`."""
    seen: Counter[str] = Counter()
    surplus = []
    for number, boot_id in rows:
        if number not in but:
            seen[boot_id] += 1
            if seen[boot_id] % 2:
                surplus.append(number)
    return surplus


def _open(path: Path) -> sqlite3.Connection:
    database = sqlite3.connect(path, timeout=1.0)
    try:
        database.execute("PRAGMA journal_mode = WAL")
        database.executescript(_TABLES)
        [verdict] = database.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise sqlite3.DatabaseError(verdict)
    except sqlite3.Error:
        database.close()
        raise
    return database
