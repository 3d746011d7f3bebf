"""A real control plane on SQLite, shared by all tests of the command line, and a way to run commands."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner, Result

from boosts.cli import app
from boosts.client import Client
from serving.family import stop_with_parent
from tests.contract.documents import capacity, measured

POOL = {
    "modelId": "tiny",
    "modelName": "Tiny",
    "description": "For tests.",
    "infraSpec": "none",
    "blocks": {
        "night": {"seats": 3, "monthlyPrice": "27.00"},
        "americas": {"seats": 2, "monthlyPrice": "39.99"},
    },
    "minSeats": 4,
    "guaranteeTokS": 20,
    "rpmLimit": 60,
    "tpmLimit": 1000,
    "declaredCapacity": capacity(model_id="tiny"),
}
_CLEARED = ("BOOSTS_MANAGEMENT_KEY", "BOOSTS_CONTROL_PLANE_URL", "BOOSTS_DEMO_POOL", "BOOSTS_DATABASE_URL")


@dataclass(frozen=True)
class RunningControlPlane:
    url: str
    operator_key: str
    command: tuple[str, ...]

    def operator(self) -> Client:
        return Client(self.url, self.operator_key)

    def new_customer(self) -> str:
        """The management key of a new account."""
        with self.operator() as client:
            return client.create_account("Customer", f"{uuid.uuid4()}@example.com")["managementKey"]

    def new_pool(self, **changes: Any) -> str:
        """The slug of a new, open pool."""
        with self.operator() as client:
            pool = client.create_pool({**POOL, "slug": f"pool-{uuid.uuid4()}", **changes})
            client.open_pool(pool["id"])
            return pool["slug"]

    def new_node(self, slug: str) -> None:
        """A node that says it is ready; the pool believes it."""
        with self.operator() as client:
            pool = next(pool for pool in client.admin_pools() if pool["slug"] == slug)
            token = client.new_join_token(slug)["joinToken"]
        enrolled = self._internal("enrol", {"join_token": token, "name": "test"})
        headers = {"Authorization": f"Bearer {enrolled['node_token']}"}
        registration = {"boot_id": str(uuid.uuid4()), "base_url": "http://127.0.0.1:9"}
        epoch = self._internal("register", registration, headers)["epoch"]
        heartbeat = {
            "epoch": epoch,
            "serving": "ready",
            "model_id": pool["modelId"],
            "revision": 1,
            "restarts": 0,
            "spooled_reports": 0,
            "clock_offset_ms": None,
            "gpus": [],
            "problem": None,
            "capacity": measured(model_id="tiny"),
        }
        self._internal("heartbeat", heartbeat, headers)

    def _internal(self, call: str, body: object, headers: dict[str, str] | None = None) -> Any:
        answer = httpx.post(f"{self.url}/internal/{call}", json=body, headers=headers)
        assert answer.status_code == 200, answer.text
        return answer.json()["data"]


@pytest.fixture(scope="session")
def control_plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningControlPlane]:
    home = tmp_path_factory.mktemp("control-plane")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = (sys.executable, "-m", "control_plane.main", "--home", str(home))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("BOOSTS_")}
    with (home / "log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--port", str(port)],
            env=environment,
            stdout=log,
            stderr=log,
            preexec_fn=stop_with_parent,  # noqa: PLW1509 - no other thread holds a lock of the loader's
        )
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_until_ready(url, process, home / "log")
        made = subprocess.run(
            [*command, "--new-operator", "ops@example.com"],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        yield RunningControlPlane(url, made.stdout.strip(), command)
    finally:
        process.terminate()
        process.wait(10)


def _wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 60
    while True:
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        try:
            if httpx.get(f"{url}/readyz").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.1)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty BOOSTS_HOME, so that no test meets the demo of this checkout."""
    monkeypatch.setenv("BOOSTS_HOME", str(tmp_path))
    for name in _CLEARED:
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def boosts(*arguments: str, stdin: str | None = None) -> Result:
    """Run a command in this process."""
    return CliRunner().invoke(app, list(arguments), prog_name="boosts", input=stdin)


def good(result: Result) -> str:
    """What a command printed that did what it should."""
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    return result.stdout


def bad(result: Result) -> str:
    """The one line that a command says when it did not."""
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    [line] = result.stderr.splitlines()
    return line
