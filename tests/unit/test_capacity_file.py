"""What is kept of a run's measurements for the next start."""

from __future__ import annotations

import asyncio
import datetime
import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from contract.capacity import NodeCapacity
from contract.step_time import StepTime
from scheduler import Capacity
from serving import capacity as module
from serving.capacity import (
    ENOUGH_SAMPLES,
    GUESS_SAMPLES,
    IDLE_S,
    CapacityFile,
    first_guess,
    keep,
    measure_while_idle,
    measured,
    told,
)
from serving.step_table import TRUSTED_SAMPLES, StepTable

CAPACITY = Capacity(slots=64, kv_tokens=100_000)
KNOWN = NodeCapacity(
    model_id="m",
    base_s=2e-3,
    prefill_token_s=3e-5,
    decode_s=4e-5,
    kv_token_s=5e-9,
    experts_s=6e-3,
    active_share=0.125,
    slots=64,
    kv_tokens=100_000,
    error=0.03,
    measured_at=datetime.datetime(2026, 5, 1, 12, tzinfo=datetime.UTC),
)


@pytest.fixture
def file(tmp_path: Path) -> CapacityFile:
    return CapacityFile(tmp_path / "capacity.json", "this set-up")


@pytest.fixture
def table() -> StepTable:
    """Of an engine that has measured enough."""
    table, path = StepTable.create(StepTime(1e-3, 1e-6, 1e-6, 1e-9), 1.0)
    path.unlink()
    table.trust(TRUSTED_SAMPLES)
    table.write(model_samples=1_000, model_error=0.05, base_s=4e-3, prefill_token_s=5e-5, decode_s=6e-5)
    return table


def test_what_was_written_is_read(file: CapacityFile) -> None:
    file.write(KNOWN)
    assert file.read() == KNOWN


def test_without_a_file_nothing_is_known(file: CapacityFile, caplog: pytest.LogCaptureFixture) -> None:
    assert file.read() is None
    assert not caplog.records


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b"null", b"[]", b"\xff\xfe\x00", b'{"model_id": "m"}'),
        *(KNOWN.model_dump_json().encode()[:-20], KNOWN.model_dump_json().replace("0.002", "-1").encode()),
        KNOWN.model_dump_json().replace("0.002", "1e999").encode(),
    ],
)
def test_a_broken_file_is_told_of_and_passed_over(
    file: CapacityFile, tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "capacity.json"
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert file.read() is None
    assert str(path) in caplog.text
    # The next save mends it.
    file.write(KNOWN)
    assert file.read() == KNOWN


def test_a_folder_in_its_place_is_told_of_and_passed_over(
    file: CapacityFile, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "capacity.json").mkdir()
    assert file.read() is None
    assert "capacity.json" in caplog.text


def test_another_set_ups_is_passed_over(file: CapacityFile, tmp_path: Path) -> None:
    """Also one without any, of an earlier version."""
    file.write(KNOWN)
    assert CapacityFile(tmp_path / "capacity.json", "another").read() is None
    (tmp_path / "capacity.json").write_text(KNOWN.model_dump_json())
    assert file.read() is None


def test_a_failed_write_leaves_the_old_file_whole(
    file: CapacityFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write(KNOWN)

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("serving.capacity.os.fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        file.write(KNOWN.model_copy(update={"slots": 1}))
    assert file.read() == KNOWN


def test_a_write_leaves_nothing_beside(file: CapacityFile, tmp_path: Path) -> None:
    file.write(KNOWN)
    file.write(KNOWN)
    assert [path.name for path in tmp_path.iterdir()] == ["capacity.json"]


def test_too_few_steps_measure_nothing(table: StepTable) -> None:
    table.write(model_samples=ENOUGH_SAMPLES - 1)
    assert measured(table, "m", CAPACITY) is None
    table.write(model_samples=ENOUGH_SAMPLES)
    assert measured(table, "m", CAPACITY) is not None


def test_what_is_measured_is_the_engines_fit(table: StepTable) -> None:
    found = measured(table, "m", CAPACITY)
    assert found is not None
    assert found.step_time == StepTime(4e-3, 5e-5, 6e-5, 0.0)
    assert (found.slots, found.kv_tokens, found.error) == (64, 100_000, 0.05)


def test_until_it_has_measured_a_node_tells_what_it_knew_with_the_size_that_it_has_now(
    table: StepTable,
) -> None:
    table.write(model_samples=ENOUGH_SAMPLES - 1)
    assert told(table, "m", CAPACITY, None) is None
    smaller = Capacity(slots=8, kv_tokens=9_000)
    assert told(table, "m", smaller, KNOWN) == KNOWN.model_copy(update={"slots": 8, "kv_tokens": 9_000})
    table.write(model_samples=ENOUGH_SAMPLES)
    found = told(table, "m", smaller, KNOWN)
    assert found is not None
    assert found.base_s == 4e-3


async def test_a_fit_without_a_complete_measurement_is_not_kept(file: CapacityFile) -> None:
    table, path = StepTable.create(StepTime(1e-3, 1e-6, 1e-6, 1e-9), GUESS_SAMPLES)
    path.unlink()
    table.write(model_samples=1_000, base_s=4e-3)
    task = asyncio.create_task(keep(file, table, "m", CAPACITY))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert file.read() is None


def test_the_first_guess_knows_of_experts_only_in_a_mixture() -> None:
    assert first_guess(0.0).experts_s == 0.0
    assert first_guess(0.125).experts_s > 0.0
    assert first_guess(0.125).active_share == 0.125


async def test_the_fit_is_saved_once_more_at_the_end(file: CapacityFile, table: StepTable) -> None:
    task = asyncio.create_task(keep(file, table, "m", CAPACITY))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    saved = file.read()
    assert saved is not None
    assert saved.base_s == 4e-3


async def test_the_fit_is_saved_now_and_then(
    file: CapacityFile, table: StepTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SAVE_S", 0.01)
    task = asyncio.create_task(keep(file, table, "m", CAPACITY))
    async with asyncio.timeout(10):
        while file.read() is None:  # noqa: ASYNC110 - what is waited for is a file
            await asyncio.sleep(0.01)
    task.cancel()


async def test_a_disk_that_takes_nothing_ends_no_node(
    tmp_path: Path, table: StepTable, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "SAVE_S", 0.01)
    file = CapacityFile(tmp_path / "no such folder" / "capacity.json", "this set-up")
    task = asyncio.create_task(keep(file, table, "m", CAPACITY))
    await asyncio.sleep(0.1)
    assert not task.done()
    assert "cannot save" in caplog.text
    task.cancel()


# --- measuring again ---------------------------------------------------------------------------------


class Engine:
    """Makes steps in `table` when it is measured, and ends each measurement as it is told."""

    def __init__(self, table: StepTable, *ends: bool | Exception) -> None:
        self.table = table
        self.ends = list(ends)

    async def measure(self) -> bool:
        self.table.count_own_time([1e-5] * 100)
        end = self.ends.pop(0)
        if isinstance(end, Exception):
            raise end
        return end


@pytest.fixture
def untrusted() -> StepTable:
    """Of an engine whose first measurement failed."""
    table, path = StepTable.create(StepTime(1e-3, 1e-6, 1e-6, 1e-9), GUESS_SAMPLES)
    path.unlink()
    table.count_own_time([1e-5] * 20)
    return table


class SlowEngine:
    """Measures until it is canceled."""

    def __init__(self) -> None:
        self.measuring = asyncio.Event()
        self.took_back = asyncio.Event()

    async def measure(self) -> bool:
        self.measuring.set()
        try:
            await asyncio.Event().wait()
        finally:
            # As vLLM takes requests back: that, too, awaits.
            await asyncio.to_thread(lambda: None)
            self.took_back.set()
        return True


async def live_through(
    monkeypatch: pytest.MonkeyPatch,
    engine: Engine,
    *intervals: Callable[[], None],
    idle: Callable[[], bool] = lambda: True,
) -> None:
    """Let intervals of `IDLE_S` pass, in each of which something happens, and then cancel. Nobody waits ten
    minutes for that: what is slept is the next of them."""
    left = list(intervals)

    async def sleep(seconds: float) -> None:
        assert seconds == IDLE_S
        if not left:
            raise asyncio.CancelledError
        left.pop(0)()

    monkeypatch.setattr("serving.capacity.asyncio.sleep", sleep)
    with pytest.raises(asyncio.CancelledError):
        await measure_while_idle(engine, engine.table, idle)


def nothing() -> None:
    pass


async def test_an_idle_node_is_measured_again_and_then_trusted(
    untrusted: StepTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(untrusted, False, True)
    await live_through(monkeypatch, engine, nothing)
    assert engine.ends == [True]
    assert untrusted.seed()[1] == GUESS_SAMPLES
    await live_through(monkeypatch, engine, nothing)
    assert engine.ends == []
    assert untrusted.seed()[1] == TRUSTED_SAMPLES


async def test_its_own_steps_are_no_sign_of_customers(
    untrusted: StepTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(untrusted, True, True)
    await live_through(monkeypatch, engine, nothing, nothing)
    assert engine.ends == []


async def test_a_node_that_serves_is_left_alone(
    untrusted: StepTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def one_step() -> None:
        untrusted.count_own_time([1e-5])

    engine = Engine(untrusted, True)
    await live_through(monkeypatch, engine, one_step, one_step, one_step)
    assert engine.ends == [True]
    await live_through(monkeypatch, engine, one_step, nothing)
    assert engine.ends == []


async def test_a_measurement_that_breaks_off_ends_no_node(
    untrusted: StepTable, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = Engine(untrusted, RuntimeError("engine is dead"), True)
    await live_through(monkeypatch, engine, nothing, nothing)
    assert "engine is dead" in caplog.text
    assert untrusted.seed()[1] == TRUSTED_SAMPLES


async def test_a_node_that_is_wanted_or_stopped_is_not_measured(
    untrusted: StepTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever waits in its queue has made no step yet."""
    engine = Engine(untrusted, True)
    await live_through(monkeypatch, engine, nothing, nothing, idle=lambda: False)
    assert engine.ends == [True]


async def test_measuring_is_called_off_when_somebody_comes(
    untrusted: StepTable, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "IDLE_S", 0.0)
    engine, somebody = SlowEngine(), asyncio.Event()
    task = asyncio.create_task(measure_while_idle(engine, untrusted, lambda: not somebody.is_set()))
    async with asyncio.timeout(5):
        await engine.measuring.wait()
    await asyncio.sleep(4 * module.LOOK_S)
    assert not engine.took_back.is_set()
    with caplog.at_level(logging.INFO):
        somebody.set()
        async with asyncio.timeout(1):
            await engine.took_back.wait()
    assert "called off" in caplog.text
    assert untrusted.seed()[1] == GUESS_SAMPLES
    # Once they have gone it is tried again.
    engine.measuring.clear()
    somebody.clear()
    async with asyncio.timeout(5):
        await engine.measuring.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_measurement_ends_with_what_runs_it(
    untrusted: StepTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "IDLE_S", 0.0)
    engine = SlowEngine()
    task = asyncio.create_task(measure_while_idle(engine, untrusted, lambda: True))
    async with asyncio.timeout(5):
        await engine.measuring.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert engine.took_back.is_set()
    assert untrusted.seed()[1] == GUESS_SAMPLES
