"""One serving process: known by number and birth, outliving its agent, leaving nothing of its group."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from agent import process as module
from agent.process import Launch, Record, ServingLog, ServingProcess
from tests.unit.agent.conftest import alive, until

pytestmark = pytest.mark.slow

SLEEP = "import time; print('up', flush=True); time.sleep(60)"


def launch(program: str = SLEEP) -> Launch:
    return Launch(model_id="m", command=(sys.executable, "-c", program), port=1, stats_port=2)


def nothing() -> None:
    pass


class Starter:
    """Starts processes that do not outlive the test."""

    def __init__(self, home: Path) -> None:
        self.log = ServingLog(home)
        self.records: list[Record] = []
        self.processes: list[ServingProcess] = []

    def start(self, program: str = SLEEP) -> ServingProcess:
        process = ServingProcess.start(
            launch(program), self.log, {"LANG": "C"}, remember=self.records.append, on_end=nothing
        )
        self.processes.append(process)
        return process

    def output(self) -> str:
        return self.log.path.read_text()


@pytest.fixture
async def starter(tmp_path: Path) -> AsyncIterator[Starter]:
    starter = Starter(tmp_path)
    yield starter
    for process in starter.processes:
        process.kill()


async def test_process_has_a_group_of_its_own_in_our_session(starter: Starter) -> None:
    starter.start("import os; print(os.getpid() == os.getpgid(0), os.getsid(0), flush=True)")
    await until(lambda: len(starter.output().split()) == 2)
    assert starter.output().split() == ["True", str(os.getsid(0))]


async def test_end_is_noticed_with_its_status(starter: Starter) -> None:
    process = starter.start("import sys; sys.exit(7)")
    await asyncio.wait_for(process.ended.wait(), 5)
    assert process.status == "ended with status 7"


async def test_process_without_a_record_never_runs(starter: Starter) -> None:
    def disk_full(record: Record) -> None:
        starter.records.append(record)
        raise OSError("disk full")

    program = "print('ran', flush=True)"
    with pytest.raises(OSError, match="disk full"):
        ServingProcess.start(launch(program), starter.log, {}, remember=disk_full, on_end=nothing)
    await until(lambda: not alive(starter.records[0].pid))
    assert starter.output() == ""


async def test_running_process_is_adopted_and_its_end_noticed(starter: Starter) -> None:
    process = starter.start()
    adopted = ServingProcess.adopt(starter.records[0], nothing)
    assert adopted is not None
    adopted.terminate()
    await asyncio.wait_for(asyncio.gather(adopted.ended.wait(), process.ended.wait()), 5)
    assert process.status == "was killed by SIGTERM"


async def test_number_given_to_another_process_is_not_adopted(starter: Starter) -> None:
    starter.start()
    record = starter.records[0]
    machine, started = record.born.split("/")
    for born in (f"{machine}/{int(started) - 1}", f"another/{started}"):
        assert ServingProcess.adopt(record.model_copy(update={"born": born}), nothing) is None
    assert alive(record.pid)


async def test_ended_process_is_not_adopted(starter: Starter) -> None:
    process = starter.start("pass")
    await asyncio.wait_for(process.ended.wait(), 5)
    assert ServingProcess.adopt(starter.records[0], nothing) is None


async def test_unreaped_process_is_not_adopted() -> None:
    child = subprocess.Popen(["sleep", "60"])  # noqa: ASYNC220, S607 - asyncio's would be reaped
    record = Record(pid=child.pid, born=module._born(child.pid), launch=launch(), was_ready=True)
    child.send_signal(signal.SIGKILL)
    await until(lambda: not alive(child.pid))
    assert ServingProcess.adopt(record, nothing) is None
    child.wait()


async def test_rest_of_the_group_ends_with_its_leader(starter: Starter) -> None:
    process = starter.start(
        f"import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', {SLEEP!r}]).pid, flush=True)"
    )
    await asyncio.wait_for(process.ended.wait(), 5)
    left = int(starter.output().split()[0])
    await until(lambda: not alive(left))


async def test_kill_reaches_the_whole_group(starter: Starter) -> None:
    process = starter.start(
        "import subprocess, sys, time;"
        f"print(subprocess.Popen([sys.executable, '-c', {SLEEP!r}]).pid, flush=True); time.sleep(60)"
    )
    await until(starter.output)
    process.kill()
    await asyncio.wait_for(process.ended.wait(), 5)
    assert process.status == "was killed by SIGKILL"
    left = int(starter.output().split()[0])
    await until(lambda: not alive(left))


async def test_each_start_begins_a_log_and_keeps_the_last(starter: Starter) -> None:
    for word in ("first", "second", "third"):
        process = starter.start(f"print('{word}')")
        await asyncio.wait_for(process.ended.wait(), 5)
    assert starter.output() == "third\n"
    assert starter.log.path.with_name("serving.log.1").read_text() == "second\n"


async def test_log_of_a_long_life_is_cut(starter: Starter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_LOG_BYTES", 10)
    go = starter.log.path.with_name("go")
    starter.start(
        "import pathlib, time; print('x' * 20, flush=True)\n"
        f"while not pathlib.Path({str(go)!r}).exists(): time.sleep(0.01)\n"
        "print('y', flush=True)"
    )
    await until(lambda: starter.output() == "x" * 20 + "\n")
    starter.log.bound()
    go.touch()
    await until(lambda: starter.output() == "y\n")
    assert starter.log.path.with_name("serving.log.1").read_text() == "x" * 20 + "\n"


def test_last_lines_are_the_end_of_the_log(tmp_path: Path) -> None:
    log = ServingLog(tmp_path)
    assert log.last_lines() == ""
    log.path.write_text("\n".join(f"line {number}" for number in range(1000)))
    assert log.last_lines(lines=2) == "line 998\nline 999"
    log.path.write_bytes(b"\x1b[31mred\x00\xff\tend\n")
    assert log.last_lines() == "[31mred\ufffd      end"
    log.path.write_text("x" * 100_000)
    assert len(log.last_lines()) <= 1500
