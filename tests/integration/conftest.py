"""One real node for all integration tests: vLLM on the CPU, the demo model, seats made as tests need them."""

from __future__ import annotations

import contextlib
import datetime
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from boosts.demo_model import build_demo_model
from contract.blocks import Block
from contract.entitlements import (
    BlockTime,
    Entitlements,
    PledgeEntitlement,
    PledgeStatus,
    PoolStatus,
    PoolTerms,
)
from contract.keys import KeyKind, key_sha256, new_key
from serving.family import stop_with_parent

SLOTS = 8
QUEUE_TIMEOUT_S = 7.0
MAX_QUEUED = 4
CPU_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "0",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}
if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    # Engines wait in busy loops: those of the workers ("gw0", "gw1") do so on different cores.
    cores = sorted(os.sched_getaffinity(0))
    core = cores[int(worker.removeprefix("gw")) % len(cores)]
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", str(core))
ALL_DAY = tuple(BlockTime.of(block) for block in Block)


@dataclass
class Seat:
    pledge: PledgeEntitlement
    key: str

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"}


@dataclass
class RunningNode:
    """A serving process and the entitlements file it follows."""

    folder: Path
    port: int
    stats_port: int
    model_path: Path
    pledges: list[PledgeEntitlement] = field(default_factory=list)
    revision: int = 0
    pool_status: PoolStatus = PoolStatus.ACTIVE
    guarantee_tok_s: float = 5.0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def stats_url(self) -> str:
        return f"http://127.0.0.1:{self.stats_port}"

    @property
    def entitlements(self) -> Path:
        return self.folder / "entitlements.json"

    def publish(self) -> None:
        """Write the pledges as a new revision, the way a control plane's agent would."""
        self.revision += 1
        snapshot = Entitlements(
            version=1,
            store_id="tests",
            revision=self.revision,
            pool=PoolTerms(
                slug="demo",
                status=self.pool_status,
                guarantee_tok_s=self.guarantee_tok_s,
                prefill_tok_s=1000.0,
            ),
            pledges=tuple(self.pledges),
        )
        fresh = self.entitlements.with_suffix(".new")
        fresh.write_text(snapshot.to_json())
        fresh.replace(self.entitlements)

    def publish_and_wait(self) -> None:
        self.publish()
        wait_for(lambda: self.stats()["entitlements_revision"] == self.revision)

    def stats(self) -> dict[str, object]:
        answer: dict[str, object] = httpx.get(f"{self.stats_url}/stats").json()
        return answer

    def all_seat_stats(self) -> list[dict[str, Any]]:
        seats = self.stats()["seats"]
        assert isinstance(seats, list)
        return seats

    def seat_stats(self, seat: Seat) -> dict[str, Any]:
        [found] = [entry for entry in self.all_seat_stats() if entry["pledge_id"] == seat.pledge.pledge_id]
        return found

    def new_seat(
        self,
        *,
        quantity: int = 1,
        rpm_limit: int = 10_000,
        tpm_limit: int = 10_000_000,
        status: PledgeStatus = PledgeStatus.ACTIVE,
        blocks: tuple[BlockTime, ...] = ALL_DAY,
    ) -> Seat:
        """A pledge of its own for one test; the node knows it when this returns."""
        key = new_key(KeyKind.BOOST)
        pledge = PledgeEntitlement(
            pledge_id=f"pledge-{len(self.pledges)}-{self.revision}",
            key_sha256=key_sha256(key),
            status=status,
            quantity=quantity,
            rpm_limit=rpm_limit,
            tpm_limit=tpm_limit,
            blocks=blocks,
            valid_until=datetime.datetime(2100, 1, 1, tzinfo=datetime.UTC),
        )
        self.pledges.append(pledge)
        self.publish_and_wait()
        return Seat(pledge, key)

    def drop_seat(self, seat: Seat) -> None:
        self.pledges.remove(seat.pledge)
        self.publish_and_wait()


def wait_for(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """Poll until `condition` holds; fails the test when it does not in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"still not true after {timeout_s} s"
        time.sleep(0.05)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def start_serving(
    node: RunningNode, *flags: str, engine_flags: tuple[str, ...] = ()
) -> subprocess.Popen[bytes]:
    """Start `python -m serving` in a process group of its own and wait until it is ready."""
    command = [
        *(
            sys.executable,
            "-m",
            "serving.main",
            "--model",
            str(node.model_path),
            "--served-model-name",
            "demo",
        ),
        *("--entitlements", str(node.entitlements), "--port", str(node.port)),
        *("--stats-port", str(node.stats_port), *flags, "--", "--enforce-eager", *engine_flags),
    ]
    log = (node.folder / "serving.log").open("wb")
    process = subprocess.Popen(
        command,
        env={**CPU_ENVIRONMENT, **os.environ},
        stdout=log,
        stderr=subprocess.STDOUT,
        process_group=0,
        preexec_fn=stop_with_parent,  # noqa: PLW1509 - no other thread holds a lock of the loader's
    )
    deadline = time.monotonic() + 240
    while True:
        assert process.poll() is None, (node.folder / "serving.log").read_text()[-3000:]
        assert time.monotonic() < deadline, (node.folder / "serving.log").read_text()[-3000:]
        try:
            if httpx.get(f"{node.stats_url}/readyz", timeout=2).status_code == 200:
                return process
        except httpx.TransportError:
            time.sleep(0.3)


def stop_group(process: subprocess.Popen[Any]) -> None:
    """SIGTERM, and SIGKILL for whatever of its group is left."""
    process.terminate()
    try:
        process.wait(15)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="session")
def demo_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_demo_model(tmp_path_factory.mktemp("model") / "demo")


@pytest.fixture(scope="session")
def node(tmp_path_factory: pytest.TempPathFactory, demo_model: Path) -> Iterator[RunningNode]:
    node = RunningNode(tmp_path_factory.mktemp("node"), free_port(), free_port(), demo_model)
    node.publish()
    process = start_serving(
        node,
        *("--queue-timeout-s", str(QUEUE_TIMEOUT_S), "--max-queued-per-seat", str(MAX_QUEUED)),
        engine_flags=("--max-num-seqs", str(SLOTS)),
    )
    try:
        yield node
    finally:
        stop_group(process)


@pytest.fixture(scope="module")
def seat(node: RunningNode) -> Iterator[Seat]:
    """A seat without limits to speak of, for one module's tests."""
    seat = node.new_seat()
    yield seat
    node.drop_seat(seat)
