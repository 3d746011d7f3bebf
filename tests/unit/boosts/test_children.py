"""Programs of the stack that end by themselves, that will not end, and that leave others behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from boosts.children import Child, kill_serving
from boosts.settings import StackError

pytestmark = pytest.mark.slow


def child(tmp_path: Path, program: str, say: Callable[[str], None] = print) -> Child:
    return Child("the program", [sys.executable, "-c", program], os.environ, tmp_path / "log", say)


def wait_for(condition: Callable[[], bool], timeout_s: float = 15.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def tend_until(program: Child, condition: Callable[[], bool]) -> None:
    def tended() -> bool:
        program.tend()
        return condition()

    wait_for(tended)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_what_never_worked_is_an_error_with_its_last_words(tmp_path: Path) -> None:
    program = child(tmp_path, "raise SystemExit('no database')")
    with pytest.raises(StackError, match="no database"):
        tend_until(program, lambda: False)


def test_what_has_worked_is_started_again_later_each_time(tmp_path: Path) -> None:
    said: list[str] = []
    program = child(tmp_path, "print('up', flush=True); import time; time.sleep(60)", said.append)
    program.proven = True
    for times in (1, 2):
        tend_until(program, lambda: (tmp_path / "log").read_text().count("up") == times)  # noqa: B023
        os.kill(program.pid, signal.SIGKILL)
        tend_until(program, lambda: len(said) == times)  # noqa: B023 - called before `times` changes
    began, killed = time.monotonic(), program.pid
    tend_until(program, lambda: program.pid != killed)
    assert time.monotonic() - began > 1
    assert said == [f"the program was killed by SIGKILL; it is started again in {s} s" for s in (1, 2)]
    program.stop(5)


def test_stop_ends_what_ignores_sigterm_and_what_it_started(tmp_path: Path) -> None:
    program = child(
        tmp_path,
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "grandchild = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(grandchild.pid, flush=True)\n"
        "time.sleep(60)\n",
    )
    wait_for(lambda: (tmp_path / "log").read_text().endswith("\n"))
    grandchild = int((tmp_path / "log").read_text())
    program.stop(0.2)
    assert not alive(program.pid)
    wait_for(lambda: not alive(grandchild))


def test_serving_is_killed_by_its_record_and_nobody_else_is(tmp_path: Path) -> None:
    record = tmp_path / "serving.json"
    program = "import time; time.sleep(60)"
    ours = subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "x")], process_group=0)
    other = subprocess.Popen([sys.executable, "-c", program], process_group=0)
    try:
        for process in (other, ours):
            wait_for(lambda: b"sleep" in Path(f"/proc/{process.pid}/cmdline").read_bytes())  # noqa: B023
            record.write_text(json.dumps({"pid": process.pid}))
            kill_serving(record)
        assert ours.wait(5) == -signal.SIGKILL
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


@pytest.mark.parametrize("content", [None, "{", "[]", '{"pid": "x"}', '{"pid": 4194305}'])
def test_a_record_that_names_nobody_kills_nobody(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "serving.json").write_text(content)
    kill_serving(tmp_path / "serving.json")
