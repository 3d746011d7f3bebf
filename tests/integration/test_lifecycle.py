"""Starting, stopping and dying: with nothing left behind, and nobody's answer lost without a word."""

from __future__ import annotations

import concurrent.futures
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil  # type: ignore[import-untyped]
import pytest

from serving.capacity import ENOUGH_SAMPLES
from tests.integration.calls import CALLS, assert_refused
from tests.integration.conftest import (
    CPU_ENVIRONMENT,
    RunningNode,
    free_port,
    start_serving,
    stop_group,
    wait_for,
)

pytestmark = pytest.mark.vllm


def family(pid: int) -> list[psutil.Process]:
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def gone(processes: list[psutil.Process]) -> bool:
    return not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes)


@pytest.fixture
def own_node(
    request: pytest.FixtureRequest, tmp_path: Path, demo_model: Path
) -> Iterator[tuple[RunningNode, subprocess.Popen[bytes]]]:
    """A node for one test to stop or kill; its parameter is the time to drain, 20 s without one."""
    drain_s = getattr(request, "param", 20)
    node = RunningNode(tmp_path, free_port(), free_port(), demo_model)
    node.publish()
    process = start_serving(node, "--drain-s", str(drain_s), engine_flags=("--max-num-seqs", "1"))
    yield node, process
    if process.poll() is None:
        stop_group(process)


def test_sigterm_lets_the_running_finish_and_gives_the_queue_back(
    own_node: tuple[RunningNode, subprocess.Popen[bytes]],
) -> None:
    node, process = own_node
    seat = node.new_seat()
    members = family(process.pid)
    assert len(members) >= 2
    with concurrent.futures.ThreadPoolExecutor() as pool:
        running = pool.submit(CALLS[2].post, node.url, seat.key, max_tokens=2000)
        wait_for(lambda: node.seat_stats(seat)["in_flight"] == 1)
        queued = pool.submit(CALLS[2].post, node.url, seat.key)
        wait_for(lambda: node.seat_stats(seat)["queued"] == 1)
        process.terminate()
        assert_refused(CALLS[2], queued.result(), 503, "draining", "")
        assert int(queued.result().headers["retry-after"]) >= 1
        assert httpx.get(f"{node.stats_url}/readyz").status_code == 503
        assert running.result().json()["usage"]["completion_tokens"] == 2000
    assert process.wait(15) == 0
    wait_for(lambda: gone(members), 5)


@pytest.mark.parametrize("own_node", [1], indirect=True)
def test_sigterm_ends_in_time_beside_a_long_request_that_nobody_reads(
    own_node: tuple[RunningNode, subprocess.Popen[bytes]],
) -> None:
    node, process = own_node
    seat = node.new_seat()
    members = family(process.pid)
    # Log probabilities make each event large enough to fill every buffer on the way.
    body = json.dumps(
        {
            "model": "demo",
            "prompt": "x",
            "max_tokens": 8000,
            "ignore_eos": True,
            "stream": True,
            "logprobs": 20,
        }
    )
    with socket.create_connection(("127.0.0.1", node.port)) as deaf:
        deaf.sendall(
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nx-api-key: {seat.key}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
        )
        wait_for(lambda: node.seat_stats(seat)["output_tokens"] > 100)
        began = time.monotonic()
        process.terminate()
        process.wait(15)
        assert time.monotonic() - began < 10
    wait_for(lambda: gone(members), 5)


def test_first_log_probabilities_find_their_kernel_compiled(
    tmp_path: Path, demo_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The compiler's cache of earlier runs would hide the compilation, which stops every seat for 12 s.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "empty-cache"))
    node = RunningNode(tmp_path, free_port(), free_port(), demo_model)
    node.publish()
    process = start_serving(node)
    try:
        seat = node.new_seat()
        body = {"model": "demo", "prompt": "x", "max_tokens": 4, "logprobs": 5}
        answer = httpx.post(f"{node.url}/v1/completions", headers=seat.headers, json=body, timeout=60)
        assert answer.status_code == 200
        assert answer.elapsed.total_seconds() < 3
    finally:
        stop_group(process)


def test_killed_serving_takes_its_engine_along(
    own_node: tuple[RunningNode, subprocess.Popen[bytes]],
) -> None:
    _, process = own_node
    members = family(process.pid)
    process.kill()
    process.wait(5)
    wait_for(lambda: gone(members), 5)


def test_killed_engine_ends_serving(own_node: tuple[RunningNode, subprocess.Popen[bytes]]) -> None:
    _, process = own_node
    members = family(process.pid)
    [engine] = [member for member in members if "EngineCore" in " ".join(member.cmdline())]
    engine.kill()
    wait_for(lambda: process.poll() is not None, 20)
    wait_for(lambda: gone(members), 5)


def test_a_second_start_begins_with_what_the_first_one_measured(tmp_path: Path, demo_model: Path) -> None:
    node = RunningNode(tmp_path, free_port(), free_port(), demo_model)
    node.publish()
    kept_in = tmp_path / "capacity.json"

    def start() -> subprocess.Popen[bytes]:
        return start_serving(node, engine_flags=("--max-num-seqs", "8"))

    stop_group(start())
    kept = json.loads(kept_in.read_text())
    # Of a dense model no step changes it, so where EngineCore begins it stays.
    kept_in.write_text(json.dumps({**kept, "active_share": 0.5}))
    process = start()
    try:
        known = {name: value for name, value in kept.items() if name != "setup"} | {"active_share": 0.5}
        assert node.stats()["capacity"] == known, "a measurement would have been told of"
        answer = CALLS[2].post(node.url, node.new_seat().key, max_tokens=ENOUGH_SAMPLES + 50)
        assert answer.status_code == 200
        found = node.stats()["capacity"]
        assert isinstance(found, dict)
        assert found["measured_at"] > kept["measured_at"]
        assert found["active_share"] == 0.5
    finally:
        stop_group(process)


def test_taken_port_is_told_before_the_model_loads(tmp_path: Path, demo_model: Path) -> None:
    node = RunningNode(tmp_path, free_port(), free_port(), demo_model)
    node.publish()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", node.port))
        taken.listen()
        ended = run_serving(node)
    assert ended.returncode == 1
    assert f"cannot listen on 127.0.0.1:{node.port}" in ended.stderr


def test_bad_entitlements_at_start_are_told_with_their_place(tmp_path: Path, demo_model: Path) -> None:
    node = RunningNode(tmp_path, free_port(), free_port(), demo_model)
    node.entitlements.write_text('{"version": 1}')
    ended = run_serving(node)
    assert ended.returncode == 1
    assert "pledges: Field required" in ended.stderr


def run_serving(node: RunningNode, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [
        *(sys.executable, "-m", "serving.main", "--model", str(node.model_path)),
        *("--entitlements", str(node.entitlements), "--port", str(node.port), *arguments),
    ]
    environment = {**CPU_ENVIRONMENT, **os.environ}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_engine_flags_that_serving_depends_on_are_refused(tmp_path: Path, demo_model: Path) -> None:
    node = RunningNode(tmp_path, free_port(), free_port(), demo_model)
    node.publish()
    ended = run_serving(node, "--", "--middleware", "os.path")
    assert ended.returncode == 1
    assert "--middleware is set by the node itself" in ended.stderr


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--scheduling-policy", "priority"), "leave --scheduling-policy alone"),
        (("--enable-lora",), "knows neither LoRA adapters nor KV connectors"),
        (("--max-model-len", "100000000"), "max_model_len"),
    ],
)
def test_what_vllm_or_the_step_scheduler_cannot_do_is_refused_before_the_engine_starts(
    tmp_path: Path, demo_model: Path, flags: tuple[str, ...], said: str
) -> None:
    node = RunningNode(tmp_path, free_port(), free_port(), demo_model)
    node.publish()
    ended = run_serving(node, "--", *flags)
    assert ended.returncode == 1
    assert said in ended.stderr
    assert "EngineCore" not in ended.stdout + ended.stderr
    assert "Traceback" not in ended.stderr


def test_an_engine_that_does_not_start_leaves_its_own_error_the_last_stack_trace(
    tmp_path: Path, demo_model: Path
) -> None:
    model = tmp_path / "without-weights"
    shutil.copytree(demo_model, model, ignore=shutil.ignore_patterns("*.safetensors"))
    node = RunningNode(tmp_path, free_port(), free_port(), model)
    node.publish()
    ended = run_serving(node, "--", "--enforce-eager")
    assert ended.returncode == 1
    assert "Cannot find any model weights" in ended.stdout + ended.stderr
    assert ended.stderr.splitlines()[-1].startswith("boosts serve: the engine did not start;")
    assert "Engine core initialization failed" not in ended.stderr
