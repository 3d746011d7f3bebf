"""The table between serving and its engine: what one mapping writes another reads, in any process."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contract.step_time import StepTime
from scheduler.step_rules import UNLIMITED
from serving.step_table import NOBODY, OWN_TIME_US, ROWS, TRUSTED_SAMPLES, SeatRow, StepReadings, StepTable

SEED = StepTime(5e-3, 50e-6, 60e-6, 1e-8, 4e-3, 0.25)


@pytest.fixture
def tables() -> Iterator[tuple[StepTable, StepTable, Path]]:
    """Two mappings of one table, and its file."""
    table, path = StepTable.create(SEED, 50.0)
    yield table, StepTable.open(path), path
    path.unlink()


def test_a_new_table_says_that_nothing_has_run(tables: tuple[StepTable, StepTable, Path]) -> None:
    _, other, _ = tables
    assert other.read() == StepReadings()
    assert other.borrowed_limit() == UNLIMITED
    assert other.own_time_counts() == [0.0] * (len(OWN_TIME_US) + 1)
    assert other.read_seat(NOBODY) == SeatRow(0.0, 1.0, 1.0, 1.0)


def test_the_seed_goes_down(tables: tuple[StepTable, StepTable, Path]) -> None:
    assert tables[1].seed() == (SEED, 50.0)


def test_more_trust_in_the_seed_goes_down_later(tables: tuple[StepTable, StepTable, Path]) -> None:
    down, up, _ = tables
    down.trust(TRUSTED_SAMPLES)
    assert up.seed() == (SEED, TRUSTED_SAMPLES)
    assert up.read() == StepReadings()


@settings(max_examples=50)
@given(
    row=st.integers(0, ROWS - 1),
    figures=st.lists(st.floats(0, 1e12), min_size=4, max_size=4),
    held=st.lists(st.floats(0, 1e6), max_size=5),
)
def test_each_row_keeps_to_itself(row: int, figures: list[float], held: list[float]) -> None:
    down, path = StepTable.create(SEED, 1.0)
    up = StepTable.open(path)
    path.unlink()
    seat = SeatRow(*figures)
    neighbours = [other for other in (row - 1, row + 1) if 0 <= other < ROWS]
    before = [up.read_seat(other) for other in neighbours]
    down.write_seat(row, seat)
    for seconds in held:
        up.add_held(row, seconds)
    assert up.read_seat(row) == seat
    assert down.held_s(row) == pytest.approx(sum(held))
    assert [up.read_seat(other) for other in neighbours] == before
    assert [down.held_s(other) for other in neighbours] == [0.0] * len(neighbours)
    assert up.seed() == (SEED, 1.0)


@pytest.mark.parametrize("name", [field.name for field in fields(StepReadings)])
def test_each_reading_comes_up_and_no_other_changes(
    tables: tuple[StepTable, StepTable, Path], name: str
) -> None:
    down, up, _ = tables
    up.write(**{name: 7.5})
    for field in fields(StepReadings):
        expected = 7.5 if field.name == name else getattr(StepReadings(), field.name)
        assert getattr(down.read(), field.name) == expected
    assert down.own_time_counts() == [0.0] * (len(OWN_TIME_US) + 1)
    assert down.seed() == (SEED, 50.0)


def test_the_step_time_comes_up_whole(tables: tuple[StepTable, StepTable, Path]) -> None:
    down, up, _ = tables
    up.write(
        base_s=1e-3, prefill_token_s=2e-6, decode_s=3e-6, kv_token_s=4e-9, experts_s=5e-3, active_share=0.06
    )
    assert down.read().step_time == StepTime(1e-3, 2e-6, 3e-6, 4e-9, 5e-3, 0.06)


def test_own_time_is_counted_in_its_bucket(tables: tuple[StepTable, StepTable, Path]) -> None:
    down, up, _ = tables
    for seconds in (5e-6, 10e-6, 11e-6, 99e-6, 0.9e-3, 2.0):
        up.count_own_time([seconds])
    assert down.own_time_counts() == [2.0, 1.0, 0.0, 1.0, 0.0, 1.0, 1.0]
    assert down.read().steps == 6
    assert down.read().own_s == pytest.approx(2.001025)


def test_another_process_reads_and_writes_it(tables: tuple[StepTable, StepTable, Path]) -> None:
    down, _, path = tables
    down.write_seat(7, SeatRow(50.0, 1_000.0, 2.0, 2.0))
    program = (
        "import sys; from pathlib import Path; from serving.step_table import StepTable\n"
        "table = StepTable.open(Path(sys.argv[1]))\n"
        "assert table.read_seat(7).guarantee_tok_s == 50.0\n"
        "table.add_held(7, 1.25); table.write(held=3.0, borrowed_limit=9.0)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(path)], check=True, timeout=60)
    assert down.held_s(7) == 1.25
    assert down.read().held == 3.0
    assert down.borrowed_limit() == 9


def test_it_lives_on_without_its_name() -> None:
    down, path = StepTable.create(SEED, 1.0)
    up = StepTable.open(path)
    path.unlink()
    up.write(held=2.0)
    assert down.read().held == 2.0


def test_a_foreign_file_is_refused(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.write_bytes(b"\x07" * 1_000_000)
    with pytest.raises(ValueError, match="not a step table"):
        StepTable.open(foreign)


@pytest.mark.parametrize("length", [0, 1, 8, 15, 16, 100, 600_000])
def test_a_truncated_table_is_refused(tables: tuple[StepTable, StepTable, Path], length: int) -> None:
    """Not opened and then read beyond its end, which would end the process."""
    whole = tables[2].read_bytes()
    assert len(whole) > length
    cut = tables[2].with_suffix(".cut")
    cut.write_bytes(whole[:length])
    try:
        with pytest.raises((ValueError, OSError)):
            StepTable.open(cut)
    finally:
        cut.unlink()


def test_a_missing_table_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nothing"):
        StepTable.open(tmp_path / "nothing")


def test_no_reading_is_ever_torn_into_nonsense(tables: tuple[StepTable, StepTable, Path]) -> None:
    """A cell is one aligned double: whatever is written, the other side reads some value that was."""
    down, up, path = tables
    program = (
        "import sys, time; from pathlib import Path; from serving.step_table import StepTable\n"
        "table = StepTable.open(Path(sys.argv[1])); end = time.monotonic() + 0.5\n"
        "print('on', flush=True)\n"
        "while time.monotonic() < end: table.write(held=1e300); table.write(held=-1e-300)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        seen = set()
        while writer.poll() is None:
            seen |= {down.read().held for _ in range(1_000)}
    assert seen <= {0.0, 1e300, -1e-300}
    assert not any(math.isnan(value) for value in seen)
    assert writer.returncode == 0
    assert up.read().held in seen
