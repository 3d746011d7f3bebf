"""One serving process, and the record by which the next agent finds it.

Serving outlives its agent: it has a process group of its own, no terminal and no pipe to the agent.
It is known by its number and its start time together, so a number that was given to another process
is never mistaken for it; and it is watched and signalled through a pidfd, which cannot change hands.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Self

from contract.documents import Document

MAX_LOG_BYTES = 64 * 1024 * 1024

# The child waits for a line before it becomes serving. An agent that dies before it has recorded the
# child closes the pipe instead, and the child ends: no serving runs that nobody knows of.
_GATE = 'read -r go && exec "$0" "$@" </dev/null'


class Launch(Document):
    """How serving is started. Another launch than the running one means a drained restart."""

    model_id: str
    command: tuple[str, ...]
    port: int
    stats_port: int


class Record(Document):
    """What is kept of a running process, in `serving.json`."""

    pid: int
    born: str
    """The machine's boot and the process's start in it."""
    launch: Launch
    was_ready: bool


class ServingLog:
    """Serving's output: `serving.log`, and what came before it in `serving.log.1`."""

    def __init__(self, home: Path) -> None:
        self.path = home / "serving.log"
        self._before = home / "serving.log.1"

    def rotate(self) -> None:
        """Begin a new file, for a new process."""
        with contextlib.suppress(FileNotFoundError):
            self.path.replace(self._before)

    def bound(self) -> None:
        """Cut the file of a running process that has grown too large; it appends, so it goes on at 0."""
        with contextlib.suppress(OSError):
            if self.path.stat().st_size > MAX_LOG_BYTES:
                shutil.copyfile(self.path, self._before)
                os.truncate(self.path, 0)

    def last_lines(self, lines: int = 15, max_bytes: int = 1500) -> str:
        """The end of it, for people, without control characters; empty if there is none."""
        try:
            with self.path.open("rb") as file:
                file.seek(max(0, self.path.stat().st_size - max_bytes))
                tail = file.read(max_bytes)
        except OSError:
            return ""
        shown = tail.decode(errors="replace").splitlines()[-lines:]
        return "\n".join("".join(filter(str.isprintable, line.expandtabs())) for line in shown)


class ServingProcess:
    """A running process, ours by birth or by adoption.

    `ended` is set once it is gone, with all that was left of its group; `on_end` is called then.
    """

    def __init__(
        self,
        record: Record,
        pidfd: int,
        child: subprocess.Popen[bytes] | None,
        on_end: Callable[[], None],
    ) -> None:
        self.record = record
        self.launch = record.launch
        self.ended = asyncio.Event()
        self._pidfd = pidfd
        self._child = child
        self._on_end = on_end
        asyncio.get_running_loop().add_reader(pidfd, self._reap)

    @classmethod
    def start(
        cls,
        launch: Launch,
        log: ServingLog,
        environment: Mapping[str, str],
        *,
        remember: Callable[[Record], None],
        on_end: Callable[[], None],
    ) -> Self:
        """Start serving; `remember` has its record before it runs. Raises OSError."""
        log.rotate()
        with log.path.open("ab") as output:
            child = subprocess.Popen(  # noqa: S603 - the operator's own command
                ["/bin/sh", "-c", _GATE, *launch.command],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                # A group, so that nothing of it is left behind and Ctrl-C does not reach it; not a session:
                # Linux shares the processor between sessions (autogroup), and serving would starve others.
                process_group=0,
            )
        assert child.stdin is not None
        with contextlib.suppress(BrokenPipeError), child.stdin as gate:
            record = Record(pid=child.pid, born=_born(child.pid), launch=launch, was_ready=False)
            remember(record)
            gate.write(b"go\n")
        return cls(record, os.pidfd_open(child.pid), child, on_end)

    @classmethod
    def adopt(cls, record: Record, on_end: Callable[[], None]) -> Self | None:
        """The recorded process, if it still runs."""
        try:
            pidfd = os.pidfd_open(record.pid)
        except OSError:
            return None
        # In this order: from here on the number cannot be given to another without the pidfd showing it.
        with contextlib.suppress(OSError):
            if _born(record.pid) == record.born:
                return cls(record, pidfd, None, on_end)
        os.close(pidfd)
        return None

    def terminate(self) -> None:
        """Ask it to drain and end."""
        if not self.ended.is_set():
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGTERM)

    def kill(self) -> None:
        """End it and its whole group."""
        if not self.ended.is_set():
            self._kill_group()

    @property
    def status(self) -> str:
        """How it ended, for people."""
        code = None if self._child is None else self._child.returncode
        if code is None:
            return "ended (it was adopted: its status is not known)"
        return f"ended with status {code}" if code >= 0 else f"was killed by {signal.Signals(-code).name}"

    def _reap(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        # Before the number is given back by `wait`: what is left of the group may hold GPU memory.
        self._kill_group()
        if self._child is not None:
            self._child.wait()
        os.close(self._pidfd)
        self.ended.set()
        self._on_end()

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.record.pid, signal.SIGKILL)


def _born(pid: int) -> str:
    """When the process started, in ticks since the machine's boot, and which boot. Raises OSError."""
    machine = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    # The name, in parentheses, may hold spaces and parentheses; field 3 is the first after it.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    if fields[0] in "ZX":
        raise ProcessLookupError(f"process {pid} has ended")
    return f"{machine}/{fields[22 - 3]}"
