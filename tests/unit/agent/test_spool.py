"""The spool: first in, first out, on disk, bounded without losing a token."""

from __future__ import annotations

import json
import random
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent import spool as module
from agent.spool import Spool
from contract.reports import ThroughputReport, parse_report
from tests.contract import documents

BOUND = 40


def report(sequence: int, boot_id: str = "boot") -> ThroughputReport:
    return parse_report(json.dumps(documents.report(boot_id=boot_id, sequence=sequence)))


def kept(spool: Spool) -> list[tuple[str, int]]:
    reports = [parse_report(spooled.document) for spooled in spool.oldest(100_000, 2**30)]
    return [(report.boot_id, report.sequence) for report in reports]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "spool.db"


@pytest.fixture
def spool(path: Path) -> Iterator[Spool]:
    spool = Spool(path, bound=BOUND)
    yield spool
    spool.close()


def test_reports_leave_in_the_order_they_came(spool: Spool) -> None:
    for sequence in range(1, 6):
        spool.put(report(sequence))
    batch = spool.oldest(2, 2**20)
    assert [parse_report(spooled.document).sequence for spooled in batch] == [1, 2]
    assert len(spool) == 5
    spool.remove(batch)
    assert kept(spool) == [("boot", 3), ("boot", 4), ("boot", 5)]


def test_reports_survive_the_agent(spool: Spool, path: Path) -> None:
    spool.put(report(1))
    assert kept(Spool(path)) == [("boot", 1)]


def test_batch_is_bounded_in_bytes_but_never_empty(spool: Spool) -> None:
    for sequence in range(1, 6):
        spool.put(report(sequence))
    size = len(spool.oldest(1, 2**20)[0].document)
    assert len(spool.oldest(100, 3 * size)) == 3
    assert len(spool.oldest(100, 1)) == 1


def test_full_spool_is_thinned_in_its_older_half_and_keeps_the_ends_of_each_boot(spool: Spool) -> None:
    for sequence in range(1, BOUND + 2):
        spool.put(report(sequence))
    sequences = [sequence for _, sequence in kept(spool)]
    assert sequences == [1, *range(3, 21, 2), *range(21, 42)]


@pytest.mark.parametrize("seed", range(3))
def test_thinning_never_loses_the_last_report_of_a_boot(spool: Spool, seed: int) -> None:
    choice = random.Random(seed)
    last: dict[str, int] = {}
    sequence = 0
    for _ in range(300):
        boot_id = f"boot-{len(last) or 1}"
        if choice.random() < 0.03:
            boot_id, sequence = f"boot-{len(last) + 1}", 0
        sequence += 1
        last[boot_id] = sequence
        spool.put(report(sequence, boot_id))
        assert len(spool) <= BOUND
    newest: dict[str, int] = {}
    for boot_id, sequence in kept(spool):
        assert sequence > newest.get(boot_id, 0)
        newest[boot_id] = sequence
    assert newest == last


def test_spool_of_boots_alone_is_bounded_too(spool: Spool, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(BOUND + 3):
        spool.put(report(1, f"boot-{number}"))
    assert len(spool) == BOUND
    assert "dropped the oldest" in caplog.text


def test_refused_reports_are_kept_aside_within_a_bound(
    spool: Spool, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_REFUSED", 3)
    for sequence in range(1, 6):
        spool.put(report(sequence))
        spool.set_aside(spool.oldest(1, 2**20)[0], f"reason {sequence}")
    assert len(spool) == 0
    rows = sqlite3.connect(path).execute("SELECT reason FROM refused ORDER BY number").fetchall()
    assert rows == [("reason 3",), ("reason 4",), ("reason 5",)]


def test_damaged_spool_is_kept_aside_and_begun_anew(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path.write_bytes(b"not a database, but long enough to be looked at as one" * 100)
    spool = Spool(path)
    spool.put(report(1))
    assert kept(spool) == [("boot", 1)]
    assert path.with_suffix(".damaged").exists()
    assert "is damaged" in caplog.text
