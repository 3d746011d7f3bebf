"""Starts and stops the servers under test: plain vLLM, and vLLM with seats.

Each is one process group that the benchmark owns. Two of them may be loaded at once: an idle vLLM waits
without polling, so that systems can be measured in turns, and `cpu_s` lets a report show that it did.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from contract.reports import ThroughputReport, parse_report

SERVED_NAME = "demo"
_STOP_S = 10.0
_HOST = "127.0.0.1"
# For a machine without a GPU, where the engine shares the cores with the load generator; a GPU build
# ignores the CPU settings. What the caller has set in the environment wins.
_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "0",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}

Progress = Callable[[str], None]


class ServerStartError(Exception):
    """A server ended or was not ready in time; the message shows the end of its log."""


@dataclass(frozen=True, slots=True)
class Engine:
    """The engine settings that both systems share."""

    model: Path | str
    max_num_seqs: int | None = None
    """None leaves it to `extra`, or to vLLM itself."""
    extra: tuple[str, ...] = ()
    """More vLLM flags, for example `("--max-model-len", "4096")`."""
    eager: bool = True
    """Whether to leave the model as it is, not compiled: the demo model is too small to be worth it."""

    def flags(self) -> list[str]:
        # Without prefix caching every prompt costs what it says.
        return [
            *([] if self.max_num_seqs is None else [f"--max-num-seqs={self.max_num_seqs}"]),
            *(["--enforce-eager"] if self.eager else []),
            "--disable-uvicorn-access-log",
            "--no-enable-prefix-caching",
            *self.extra,
        ]


@dataclass(frozen=True, slots=True)
class Launch:
    """How to start one server and see that it is ready."""

    name: str
    command: tuple[str, ...]
    base_url: str
    ready_url: str
    metrics_url: str = ""
    """Of its Prometheus metrics."""
    stats_url: str = ""
    """Of a node's throughput report."""


def plain_vllm(engine: Engine) -> Launch:
    """vLLM's own API server, as it comes."""
    port = free_port()
    command = [sys.executable, "-m", "benchmarks.plain_vllm"]
    command += [f"--model={engine.model}", f"--served-model-name={SERVED_NAME}"]
    command += [f"--host={_HOST}", f"--port={port}", *engine.flags()]
    url = f"http://{_HOST}:{port}"
    return Launch("plain vLLM", tuple(command), url, f"{url}/health", f"{url}/metrics")


def seat_node(engine: Engine, entitlements: Path) -> Launch:
    """vLLM with seats, serving those of the entitlements file."""
    port, stats_port = free_port(), free_port()
    command = [sys.executable, "-m", "serving"]
    command += [f"--model={engine.model}", f"--served-model-name={SERVED_NAME}"]
    command += [f"--entitlements={entitlements}", f"--port={port}", f"--stats-port={stats_port}"]
    command += ["--", *engine.flags()]
    url, stats_url = f"http://{_HOST}:{port}", f"http://{_HOST}:{stats_port}"
    return Launch(
        "with seats",
        tuple(command),
        url,
        f"{stats_url}/readyz",
        f"{stats_url}/metrics",
        f"{stats_url}/stats",
    )


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        return int(probe.getsockname()[1])


class Server:
    """One running server: a process group of its own, its output in a log file.

    A terminal's Ctrl-C therefore reaches only the benchmark, which stops the server.
    """

    def __init__(self, launch: Launch, log: Path) -> None:
        self.launch = launch
        self.log = log
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                launch.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                # Not a session of its own: Linux schedules sessions as units (autogroup), and on a full
                # machine the load generator then did not get to run for seconds at a time.
                process_group=0,
                env={**_ENVIRONMENT, **os.environ},
            )

    def ready(self) -> bool:
        """Whether it answers. Raises ServerStartError if it has ended."""
        if self._process.poll() is not None:
            raise ServerStartError(
                f"{self.launch.name} ended with status {self._process.returncode}; the end of {self.log}:\n"
                f"{self._log_end()}"
            )
        try:
            with urllib.request.urlopen(self.launch.ready_url, timeout=2) as answer:  # noqa: S310 - our own http URL
                return bool(answer.status == 200)
        except (OSError, urllib.error.URLError):
            return False

    def wait_ready(self, timeout_s: float, progress: Progress) -> None:
        """Return once it answers; raise ServerStartError if it ends or takes longer than `timeout_s`."""
        began = said = time.monotonic()
        while not self.ready():
            waited_s = time.monotonic() - began
            if waited_s > timeout_s:
                raise ServerStartError(
                    f"{self.launch.name} was not ready after {timeout_s:.0f} s; the end of {self.log}:\n"
                    f"{self._log_end()}"
                )
            if time.monotonic() - said >= 5:
                said = time.monotonic()
                progress(f"{self.launch.name}: loading, {waited_s:.0f} s")
            time.sleep(0.25)
        progress(f"{self.launch.name}: ready")

    def metrics(self) -> str:
        """Its Prometheus metrics, as text."""
        return _get(self.launch.metrics_url)

    def report(self) -> ThroughputReport:
        """A node's counters per seat."""
        return parse_report(_get(self.launch.stats_url))

    def cpu_s(self) -> float:
        """Processor seconds that its processes have used so far."""
        used_s = 0.0
        for process in self._family():
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                used_s += times.user + times.system
        return used_s

    def stop(self) -> None:
        """SIGTERM, and SIGKILL for what is left of the group after 10 s or on a further Ctrl-C."""
        family = self._family()
        try:
            self._signal_group(signal.SIGTERM)
            # The others are not our children, so psutil polls them; the leader must be reaped here.
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_STOP_S)
            psutil.wait_procs(family, timeout=1)
        finally:
            self._signal_group(signal.SIGKILL)
            for process in family:
                # A server may have given a child a group of its own.
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            self._process.wait()
            psutil.wait_procs(family, timeout=2)

    def _family(self) -> list[psutil.Process]:
        try:
            leader = psutil.Process(self._process.pid)
            return [leader, *leader.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def _signal_group(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _log_end(self, lines: int = 15) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


def _get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as answer:  # noqa: S310 - our own http URL
        return str(answer.read().decode())


@contextlib.contextmanager
def running(
    launches: Sequence[Launch],
    logs: Path,
    progress: Progress,
    timeout_s: float = 300.0,
    *,
    together: bool = True,
) -> Iterator[list[Server]]:
    """Start all servers, `together` or one after the other has loaded; stop every one at the end."""
    servers: list[Server] = []
    with contextlib.ExitStack() as stack:
        for launch in launches:
            server = Server(launch, logs / f"{launch.name.replace(' ', '-')}.log")
            stack.callback(server.stop)
            servers.append(server)
            progress(f"{launch.name}: starting, log in {server.log}")
            if not together:
                server.wait_ready(timeout_s, progress)
        for server in servers if together else ():
            server.wait_ready(timeout_s, progress)
        yield servers
        progress("stopping the servers")
