"""What a node knows of its speed: what counts as the same engine, and how it is measured."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncGenerator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.capacity import main as measure_capacity
from contract.capacity import parse_capacity
from tests.integration.conftest import CPU_ENVIRONMENT

pytestmark = pytest.mark.vllm

# --- what counts as the same engine --------------------------------------------------------------

NGRAMS = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}
SETUP = """
import sys
from pathlib import Path
from tests.integration.test_measuring import setup_of
print(setup_of(Path(sys.argv[1]), "--enforce-eager"))
"""


def setup_of(model: Path, *flags: str, told: bool = True) -> str:
    """The set-up that serving would keep its measurements by; without the flags' own words, if they are not
    `told` to it."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    from serving import launch

    options = launch.ServeOptions(str(model), Path("none"), engine_flags=flags)
    config = AsyncEngineArgs.from_cli_args(launch._engine_args(options)).create_engine_config()
    return launch._setup_of(config, flags if told else ())


@pytest.fixture
def model(demo_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The model, in the environment that serving has here: vLLM reads it in this process, too."""
    for name, value in CPU_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    return demo_model


@pytest.mark.parametrize(
    "flags",
    [
        ("--kv-cache-dtype", "fp8"),
        ("--speculative-config", json.dumps(NGRAMS)),
        ("--attention-backend", "CPU_ATTN"),
        ("--compilation-config", '{"mode": 0}'),
        ("--enforce-eager",),
        ("--max-num-seqs", "8"),
        ("--max-num-batched-tokens", "1024"),
        ("--max-model-len", "1024"),
        ("--dtype", "float32"),
    ],
)
def test_an_engine_that_its_flags_make_another_is_measured_anew(model: Path, flags: tuple[str, ...]) -> None:
    assert setup_of(model, *flags, told=False) != setup_of(model, told=False)


@pytest.mark.parametrize("flags", [("--distributed-executor-backend", "mp")])
def test_flags_that_leave_the_kernels_alone_count_too(model: Path, flags: tuple[str, ...]) -> None:
    assert setup_of(model, *flags, told=False) == setup_of(model, told=False), "it belongs above"
    assert setup_of(model, *flags) != setup_of(model)


def test_an_engine_on_other_cores_is_measured_anew(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = setup_of(model)
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "1")
    assert setup_of(model) != before
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0")
    assert setup_of(model) == before
    # As on a machine with more cores than whoever runs this may have.
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(77)))
    assert setup_of(model) != before


def test_another_model_in_the_same_place_is_measured_anew(model: Path, tmp_path: Path) -> None:
    place = tmp_path / "model"
    place.symlink_to(model)
    before = setup_of(place)
    place.unlink()
    place.mkdir()
    for file in model.iterdir():
        (place / file.name).symlink_to(file)
    (place / "config.json").unlink()
    config = json.loads((model / "config.json").read_text())
    (place / "config.json").write_text(json.dumps({**config, "intermediate_size": 64}))
    assert setup_of(place) != before


def test_the_same_engine_is_known_again_in_another_process(model: Path) -> None:
    told = [
        subprocess.run(
            [sys.executable, "-c", SETUP, str(model)],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        ).stdout.splitlines()[-1]
        for seed in ("1", "2")
    ]
    assert len(told[0]) == 64
    assert told[0] == told[1]


# --- serving measures itself ---------------------------------------------------------------------


async def measured(monkeypatch: pytest.MonkeyPatch, ends: str) -> tuple[bool, dict[str, list[int]]]:
    """Whether an engine whose requests end for this reason counts as measured, and what it was asked.

    A real engine measures itself in every test that starts one; that it is stopped just then, no test can
    choose, so what it answers is played here.
    """
    from vllm.v1.engine.async_llm import AsyncLLM

    from serving.engine import SeatLLM

    asked: dict[str, list[int]] = {}

    async def generate(self: Any, prompt: Any, params: Any, request_id: str) -> AsyncGenerator[Any, None]:
        asked[request_id] = prompt["prompt_token_ids"]
        await asyncio.sleep(0)
        yield SimpleNamespace(outputs=[SimpleNamespace(finish_reason=ends)])

    monkeypatch.setattr(AsyncLLM, "generate", generate)
    engine: Any = SeatLLM.__new__(SeatLLM)
    engine.scheduler_config = SimpleNamespace(max_num_seqs=16)
    engine.model_config = SimpleNamespace(max_model_len=2_048, get_vocab_size=lambda: 2_000)
    return await engine.measure(), asked


async def test_an_engine_that_is_being_stopped_was_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    complete, asked = await measured(monkeypatch, "length")
    assert complete
    assert max(map(len, asked.values())) == 1_024
    assert sum(name.startswith("measure-2-") for name in asked) == 16
    complete, asked = await measured(monkeypatch, "abort")
    assert not complete
    assert len(asked) == 1


async def test_no_measurement_finds_the_prompts_of_the_last_one_in_the_prefix_cache(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (_, first), (_, second) = [await measured(monkeypatch, "length") for _ in range(2)]
    assert first.keys() == second.keys()
    assert all(first[name] != second[name] for name in first if len(first[name]) > 1)


# --- boosts capacity -----------------------------------------------------------------------------


def test_capacity_is_measured_written_and_drawn(demo_model: Path, tmp_path: Path) -> None:
    arguments = ["--model", str(demo_model), "--model-id", "demo", "--out", str(tmp_path), "--level-s", "1"]
    # Spelt as only vLLM reads it: the slots are the engine's own word.
    flags = ["--enforce-eager", "--max_num_seqs=2", "--max-num-batched-tokens=1024", "--max-model-len=2048"]
    assert measure_capacity([*arguments, "--", *flags]) == 0
    capacity = parse_capacity((tmp_path / "capacity.json").read_bytes())
    assert (capacity.model_id, capacity.slots, capacity.step_tokens) == ("demo", 2, 1_024)
    assert capacity.measured_at is not None
    assert 0 < capacity.step_time.seconds(0, 1, 100) < 1
    assert (tmp_path / "capacity.png").read_bytes().startswith(b"\x89PNG")
