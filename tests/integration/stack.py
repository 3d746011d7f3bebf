"""A whole `boosts run` for tests: started on free ports in a folder of its own, walked over HTTP."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil  # type: ignore[import-untyped]

from contract.blocks import Block
from serving.family import stop_with_parent
from tests.integration.conftest import free_port, wait_for

START_S = 300.0
"""Loading the model on two cores that others use too."""
ALL_BLOCKS = tuple(block.value for block in Block)
PORTS = {name: f"BOOSTS_{name.upper()}_PORT" for name in ("control_plane", "inference", "stats", "agent")}


@dataclass
class Account:
    """A customer of the stack's control plane."""

    stack: Stack
    key: str

    def call(self, method: str, path: str, body: object = None) -> httpx.Response:
        return self.stack.call(method, path, body, key=self.key)

    def data(self, method: str, path: str, body: object = None) -> Any:
        return success(self.call(method, path, body))

    def put_card(self, payment_method: str = "pm_card_visa") -> None:
        self.data("POST", "/api/billing/payment-method", {"paymentMethod": payment_method})

    def delivered_tokens(self) -> int:
        path = f"/api/pools/{self.stack.slug}/my-throughput"
        return int(self.data("GET", path)["totals"]["deliveredTokens"])


@dataclass
class Stack:
    """`boosts run`, its folder and its ports. What it prints goes to `output`."""

    home: Path
    slug: str = "demo"
    overrides: dict[str, Any] = field(default_factory=dict)
    ports: dict[str, int] = field(default_factory=lambda: {name: free_port() for name in PORTS})
    process: subprocess.Popen[bytes] = field(init=False)

    @property
    def environment(self) -> dict[str, str]:
        named = {"BOOSTS_HOME": str(self.home), "HF_HUB_OFFLINE": "1"}
        if self.overrides:
            file = self.home.with_suffix(".json")
            file.write_text(json.dumps(self.overrides))
            named["BOOSTS_DEMO_POOL"] = str(file)
        ports = {variable: str(self.ports[name]) for name, variable in PORTS.items()}
        return {**os.environ, **named, **ports}

    @property
    def output(self) -> Path:
        return self.home.with_suffix(".out")

    @property
    def node_home(self) -> Path:
        return self.home / f"node-{self.slug}"

    @property
    def control_plane_url(self) -> str:
        return f"http://127.0.0.1:{self.ports['control_plane']}"

    @property
    def inference_url(self) -> str:
        return f"http://127.0.0.1:{self.ports['inference']}"

    @property
    def agent_url(self) -> str:
        return f"http://127.0.0.1:{self.ports['agent']}"

    # ---- its life ----

    def start(self) -> None:
        """Start it; a process group of its own, so that a test can send it what a terminal would."""
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "boosts", "run"],
                env=self.environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                process_group=0,
                preexec_fn=stop_with_parent,  # noqa: PLW1509 - no other thread holds a lock of the loader's
            )

    def wait_for_output(self, text: str, timeout_s: float = START_S) -> None:
        def said() -> bool:
            assert self.process.poll() is None, self.output.read_text()
            return text in self.output.read_text()

        wait_for(said, timeout_s)

    def wait_until_live(self) -> None:
        self.wait_for_output("ready after")

    def wait_until_node_ready(self) -> None:
        wait_for(lambda: status_of(f"{self.agent_url}/readyz") == 200, START_S)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> float:
        """Ask it to end; how long it took."""
        began = time.monotonic()
        self.process.send_signal(number)
        self.process.wait(20)
        return time.monotonic() - began

    def kill_what_is_left(self) -> None:
        """For the end of a test that failed: its processes, serving included, and only those."""
        members = self.processes()
        with contextlib.suppress(psutil.Error):
            self.process.kill()
        self.process.wait()
        for member in members:
            with contextlib.suppress(psutil.Error):
                member.kill()

    # ---- its processes ----

    def processes(self) -> list[psutil.Process]:
        """All that belong to it. Serving whose agent was killed is nobody's child, but in its record."""
        serving = self.serving_pid()
        found: dict[int, psutil.Process] = {}
        for root in (self.process.pid, *([] if serving is None else [serving])):
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(root)
                for member in (process, *process.children(recursive=True)):
                    found[member.pid] = member
        return list(found.values())

    def running(self, module: str) -> psutil.Process:
        """The one process of ours that runs this module or has this name."""
        [found] = [process for process in self.processes() if module in " ".join(_cmdline(process))]
        return found

    def serving_pid(self) -> int | None:
        """Of the process in the agent's record, if it runs."""
        with contextlib.suppress(FileNotFoundError, psutil.NoSuchProcess):
            pid: int = json.loads((self.node_home / "serving.json").read_text())["pid"]
            # A stale record may name a process of somebody else's.
            if str(self.node_home) in " ".join(psutil.Process(pid).cmdline()):
                return pid
        return None

    # ---- its APIs ----

    def demo(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.home / "demo.json").read_text())
        return content

    def call(self, method: str, path: str, body: object = None, *, key: str | None = None) -> httpx.Response:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return httpx.request(method, self.control_plane_url + path, json=body, headers=headers, timeout=30)

    def as_operator(self, method: str, path: str, body: object = None) -> Any:
        return success(self.call(method, path, body, key=self.demo()["operator_key"]))

    def new_account(self) -> Account:
        body = {"name": "Customer of a test", "email": f"{uuid.uuid4()}@example.com"}
        return Account(self, self.as_operator("POST", "/api/admin/accounts", body)["managementKey"])

    def new_seat(self, blocks: Sequence[str] = ALL_BLOCKS) -> tuple[Account, str]:
        """A new account with a seat in the live pool, and its boost key once the node knows it."""
        account = self.new_account()
        account.put_card()
        made = account.data("POST", f"/api/pools/{self.slug}/subscribe", {"blocks": blocks})
        key = made["key"]["apiKey"]
        wait_for(lambda: status_of(f"{self.inference_url}/v1/models", key) == 200, 5)
        return account, key

    def infer(self, key: str, max_tokens: int = 4) -> httpx.Response:
        return httpx.post(
            f"{self.inference_url}/v1/completions",
            headers={"Authorization": f"Bearer {key}"},
            json={"model": "demo", "prompt": "hello", "max_tokens": max_tokens, "ignore_eos": True},
            timeout=60,
        )


class Traffic:
    """Streams one after another with one key, from a thread, until `stop`. Counts what it gets."""

    def __init__(self, url: str, key: str, tokens_each: int) -> None:
        self.tokens = 0
        """By the usage that each answer ends with."""
        self.faults: list[str] = []
        self.longest_gap_s = 0.0
        """Between two events, over all streams."""
        self._url = url
        self._key = key
        self._tokens_each = tokens_each
        self._events = 0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()
        self.wait_for_progress()

    def wait_for_progress(self) -> None:
        """Until there are new events."""
        before = self._events
        wait_for(lambda: self._events > before + 3 or not self._thread.is_alive(), 60)
        assert not self.faults, self.faults

    def stop(self) -> None:
        """Let the last stream end."""
        self._stopping.set()
        self._thread.join(60)
        assert not self._thread.is_alive()

    def _work(self) -> None:
        body = {
            "model": "demo",
            "prompt": "hello",
            "max_tokens": self._tokens_each,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        headers = {"Authorization": f"Bearer {self._key}"}
        with httpx.Client(base_url=self._url, headers=headers, timeout=60) as client:
            while not self._stopping.is_set() and not self.faults:
                try:
                    self._one(client, body)
                except (httpx.HTTPError, ValueError, KeyError) as error:
                    self.faults.append(repr(error))

    def _one(self, client: httpx.Client, body: dict[str, Any]) -> None:
        last = time.monotonic()
        usage = None
        with client.stream("POST", "/v1/completions", json=body) as answer:
            if answer.status_code != 200:
                raise ValueError(f"{answer.status_code}: {answer.read().decode()}")
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    now = time.monotonic()
                    self.longest_gap_s = max(self.longest_gap_s, now - last)
                    last = now
                    self._events += 1
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        raise ValueError(line)
                    usage = event.get("usage") or usage
        if usage is None:
            raise ValueError("the stream ended early")
        self.tokens += usage["completion_tokens"]


@contextlib.contextmanager
def running_stack(stack: Stack) -> Iterator[Stack]:
    """Start it; whatever happens, nothing of it is left."""
    stack.start()
    try:
        yield stack
    finally:
        if stack.process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                stack.stop()
        stack.kill_what_is_left()


def success(answer: httpx.Response) -> Any:
    """The data of a success."""
    envelope = answer.json()
    assert answer.status_code == 200, envelope
    assert set(envelope) == {"success", "data"}
    assert envelope["success"] is True
    return envelope["data"]


def assert_error(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """The error in the envelope of the pools API."""
    envelope = answer.json()
    assert answer.status_code == status, envelope
    assert set(envelope) == {"success", "error"}
    assert envelope["success"] is False
    error: dict[str, Any] = envelope["error"]
    assert {"code", "message"} <= set(error) <= {"code", "message", "details"}
    assert error["code"] == code
    assert error["message"]
    return error


def status_of(url: str, key: str | None = None) -> int:
    """The status that a GET gets; 0 when nobody answers."""
    try:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return httpx.get(url, headers=headers, timeout=3).status_code
    except httpx.TransportError:
        return 0


def all_gone(processes: list[psutil.Process]) -> bool:
    """Whether none of them runs any more."""
    return not any(_runs(process) for process in processes)


def _runs(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _cmdline(process: psutil.Process) -> list[str]:
    try:
        words: list[str] = process.cmdline()
    except psutil.Error:
        return []
    return words
