"""The programs that the embedded stack is made of, as child processes that are kept running."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from boosts.settings import StackError
from serving.family import stop_with_parent

ROOT = Path(__file__).parent.parent
"""Where the programs are found, installed or not."""

_FIRST_DELAY_S = 1.0
_MOST_DELAY_S = 30.0
_FORGIVEN_S = 60.0
"""Who has run for this long is started again as soon as if it had never failed."""


class Child:
    """One program: in a process group of its own, with a log, started again when it ends by itself.

    Until it is `proven` its end is an error instead: what has never worked will not work the next time.
    It dies with us, even when we are killed.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        log: Path,
        say: Callable[[str], None],
    ) -> None:
        self.proven = False
        self._name = name
        self._command = command
        self._environment = environment
        self._log = log
        self._say = say
        self._delay_s = _FIRST_DELAY_S
        self._start_at = 0.0
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_bytes(b"")
        self._process = self._start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def tend(self) -> None:
        """Start it again when it has ended, later each time. Raises StackError if it was never proven."""
        status = self._process.poll()
        if status is None:
            return
        now = time.monotonic()
        if not self.proven:
            raise StackError(f"{self._name} did not start (log: {self._log}):\n{last_lines(self._log)}")
        if self._start_at <= self._started:
            # This end is news: decide when to start again.
            if now - self._started >= _FORGIVEN_S:
                self._delay_s = _FIRST_DELAY_S
            self._start_at = now + self._delay_s
            self._say(f"{self._name} {_how(status)}; it is started again in {self._delay_s:.0f} s")
            self._delay_s = min(2 * self._delay_s, _MOST_DELAY_S)
        if now >= self._start_at:
            self._process = self._start()

    def stop(self, patience_s: float) -> None:
        """SIGTERM; after `patience_s` SIGKILL for it and for what is left of its group."""
        if self._process.poll() is None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(patience_s)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _start(self) -> subprocess.Popen[bytes]:
        with self._log.open("ab") as output:
            process = subprocess.Popen(
                self._command,
                env=self._environment,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                # A group, so that Ctrl-C reaches us alone and we stop everything in order. Not a session:
                # Linux shares the processor between sessions, not processes (autogroup), and a busy engine
                # would starve its own clients on the same machine.
                process_group=0,
                preexec_fn=stop_with_parent,  # noqa: PLW1509 - this process has one thread
            )
        self._started = time.monotonic()
        return process


def kill_serving(record: Path) -> None:
    """SIGKILL for the group of the serving process in an agent's record, should it still run."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        pid = int(json.loads(record.read_text())["pid"])
        # The number may have gone to another process since; serving is told of files in its agent's folder.
        if str(record.parent).encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.killpg(pid, signal.SIGKILL)


def last_lines(log: Path, lines: int = 15) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def _how(status: int) -> str:
    return f"ended with status {status}" if status >= 0 else f"was killed by {signal.Signals(-status).name}"
