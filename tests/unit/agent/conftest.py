"""A node for a test: its folder, its ports, its agent here or in a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import aiohttp
import psutil  # type: ignore[import-untyped]
import pytest

from agent.agent import Agent, opened
from agent.options import Options, Pace
from tests.unit.agent.control_plane_stand_in import ControlPlane

STAND_IN = Path(__file__).with_name("serving_stand_in.py")
ROOT = Path(__file__).parents[3]

HASTE = Pace(
    heartbeat_s=0.1,
    orders_wait_s=1.0,
    call_s=2.0,
    retry_first_s=0.05,
    retry_most_s=0.1,
    look_s=1.0,
    sample_s=0.05,
    doubt_s=2.0,
    drain_sample_s=0.01,
    report_s=0.2,
    restart_first_s=0.05,
    restart_most_s=0.2,
    kill_s=0.5,
)


@dataclass
class RunningAgent:
    """An agent in this process, and what it returns in the end."""

    agent: Agent
    status: asyncio.Task[int]


@dataclass
class Node:
    """One machine, as far as an agent can tell."""

    home: Path
    control_plane: ControlPlane
    port: int
    stats_port: int
    agent_port: int
    processes: list[asyncio.subprocess.Process] = field(default_factory=list)

    @property
    def options(self) -> Options:
        return Options(
            control_plane=self.control_plane.url,
            home=self.home,
            name="test",
            base_url=f"http://127.0.0.1:{self.port}",
            join_token=self.control_plane.join_token,
            port=self.port,
            stats_port=self.stats_port,
            agent_port=self.agent_port,
            drain_s=1,
            serving=(sys.executable, str(STAND_IN)),
            pace=HASTE,
        )

    @contextlib.asynccontextmanager
    async def agent(self, options: Options | None = None, **pace: float) -> AsyncIterator[RunningAgent]:
        """An agent that works here meanwhile, and goes without a word at the end."""
        options = options or self.options
        async with opened(replace(options, pace=replace(options.pace, **pace))) as agent:
            running = RunningAgent(agent, asyncio.create_task(agent.run()))
            try:
                yield running
            finally:
                running.status.cancel()
                await asyncio.gather(running.status, return_exceptions=True)

    async def start_process(self, *arguments: str) -> asyncio.subprocess.Process:
        """A real `python -m agent.main` whose `serving.main` is the stand-in, because of its folder."""
        folder = self.home.with_name("checkout")
        (folder / "serving").mkdir(parents=True, exist_ok=True)
        (folder / "serving" / "__init__.py").touch()
        (folder / "serving" / "main.py").write_bytes(STAND_IN.read_bytes())
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "agent.main", "--control-plane", self.control_plane.url),
            *("--home", str(self.home), "--port", str(self.port), "--stats-port", str(self.stats_port)),
            *("--agent-port", str(self.agent_port), "--drain-s", "2", *arguments),
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT), "BOOSTS_JOIN_TOKEN": self.control_plane.join_token},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        self.processes.append(process)
        return process

    async def tell(self, **changes: Any) -> None:
        """Tell serving what to do."""
        url = f"http://127.0.0.1:{self.port}/"
        with contextlib.suppress(aiohttp.ClientError):
            async with aiohttp.ClientSession() as session, session.put(url, data=json.dumps(changes)):
                pass

    def plan(self, **changes: Any) -> None:
        """The same for all that start from now on."""
        self.home.mkdir(exist_ok=True)
        (self.home / "stand-in.json").write_text(json.dumps(changes))

    async def ask_serving(self) -> dict[str, Any] | None:
        """What it says of itself; None if it does not run."""
        with contextlib.suppress(aiohttp.ClientError):
            async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{self.port}/") as r:
                answer: dict[str, Any] = json.loads(await r.read())
                return answer
        return None

    async def until_looked_at(self) -> None:
        """Serving's counters, as they are now, have been seen."""
        before = await self.ask_serving()
        assert before is not None
        while True:
            now = await self.ask_serving()
            if now is None or now["looks"] >= before["looks"] + 2:
                return
            await asyncio.sleep(0.01)

    async def ask_agent(self, path: str) -> tuple[int, str]:
        url = f"http://127.0.0.1:{self.agent_port}{path}"
        async with aiohttp.ClientSession() as session, session.get(url) as response:
            return response.status, await response.text()

    async def ready(self) -> bool:
        with contextlib.suppress(aiohttp.ClientError):
            return (await self.ask_agent("/readyz"))[0] == 200
        return False

    async def until_ready(self, other_than: int = 0) -> int:
        """Serving's process number, once the agent finds it ready."""
        async with asyncio.timeout(10):
            while True:
                with contextlib.suppress(FileNotFoundError):
                    if await self.ready() and self.pid != other_than:
                        return self.pid
                await asyncio.sleep(0.02)

    @property
    def pid(self) -> int:
        """Of serving, as recorded."""
        return int(json.loads((self.home / "serving.json").read_text())["pid"])

    def servings(self) -> list[psutil.Process]:
        """All processes that serve for this node."""
        mark = str(self.home / "entitlements.json")
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if mark in process.cmdline():
                    found.append(process)
        return found


async def until(condition: Callable[[], object], timeout_s: float = 8.0) -> None:
    """Wait until it holds; fails the test when it does not in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"still not true after {timeout_s} s"
        await asyncio.sleep(0.01)


def alive(pid: int) -> bool:
    """Whether it runs; a zombie does not."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


@pytest.fixture
async def control_plane() -> AsyncIterator[ControlPlane]:
    control_plane = ControlPlane(free_ports(1)[0])
    await control_plane.start()
    yield control_plane
    control_plane.thawed.set()
    await control_plane.stop()


@pytest.fixture
async def node(tmp_path: Path, control_plane: ControlPlane) -> AsyncIterator[Node]:
    home = tmp_path / "node"
    home.mkdir()
    port, stats_port, agent_port = free_ports(3)
    node = Node(home, control_plane, port, stats_port, agent_port)
    yield node
    for agent in node.processes:
        with contextlib.suppress(ProcessLookupError):
            agent.kill()
        await agent.communicate()
    for serving in node.servings():
        with contextlib.suppress(ProcessLookupError):
            os.killpg(serving.pid, signal.SIGKILL)
