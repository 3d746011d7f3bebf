"""Held, preempted and resumed work on the real vLLM: its scheduler stepped by hand."""

from __future__ import annotations

import math
import os
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from contract.step_time import StepTime
from serving.step_table import ENVIRONMENT, NOBODY, SeatRow, StepTable
from tests.integration.conftest import SLOTS, RunningNode, free_port
from tests.integration.test_lifecycle import run_serving

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.request import Request

    from serving.step_scheduler import SeatScheduler

pytestmark = pytest.mark.vllm

# --- vLLM's scheduler, stepped by hand -----------------------------------------------------------

KV_BLOCK = 16
MACHINE = StepTime(base_s=2e-3, prefill_token_s=20e-6, decode_s=100e-6, kv_token_s=0.0)
"""A step with n decodes takes 2 + n/10 ms."""
SOLD, FREE, OTHER = 1, 2, 3
"""Rows of the table."""


@dataclass
class Clock:
    """In the place of the `time` module: moves when a step is done."""

    now: float = 1_000.0

    def monotonic(self) -> float:
        return self.now

    def thread_time(self) -> float:
        return self.now


@dataclass
class Stepper:
    """`SeatScheduler` as EngineCore drives it, without a model: tokens are made up."""

    scheduler: SeatScheduler
    table: StepTable
    clock: Clock
    under_way: int = 2
    """Batches at a time: one with --no-async-scheduling."""
    batches: deque[tuple[Any, list[str], float]] = field(default_factory=deque)
    requests: dict[str, Request] = field(default_factory=dict)
    made: dict[str, list[float]] = field(default_factory=dict)
    told: list[str] = field(default_factory=list)
    """In the order in which the API process is told of their tokens."""
    finished: set[str] = field(default_factory=set)
    preempted: list[str] = field(default_factory=list)
    free_at: float = 0.0
    count: int = 0

    def add(
        self,
        row: int = FREE,
        *,
        prompt: int = 8,
        output: int = 10_000,
        tokens: list[int] | None = None,
        due_in: float = math.inf,
    ) -> str:
        from vllm.sampling_params import SamplingParams
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.request import Request

        init_none_hash(sha256)
        self.count += 1
        name = f"r{self.count}"
        extra = {"boosts_seat": row, "boosts_due": self.clock.now + due_in}
        params = SamplingParams(max_tokens=output, ignore_eos=True, extra_args=extra)
        rng = random.Random(name)
        request = Request(
            name,
            tokens or [rng.randrange(2_000) for _ in range(prompt)],
            params,
            None,
            block_hasher=get_request_block_hasher(KV_BLOCK, sha256),
        )
        self.requests[name] = request
        self.made[name] = []
        self.scheduler.add_request(request)
        return name

    def abort(self, name: str) -> None:
        from vllm.v1.request import RequestStatus

        self.scheduler.finish_requests([name], RequestStatus.FINISHED_ABORTED)
        self.finished.add(name)

    def sell(self, g: float, row: int = SOLD, quantity: int = 1, *, prefill_tok_s: float = 1_000.0) -> None:
        self.table.write_seat(row, SeatRow(g, prefill_tok_s, float(quantity), 1.0))

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.step()

    def step(self) -> Any:
        scheduler = self.scheduler
        before = {r.request_id: r.num_preemptions for r in scheduler.requests.values()}
        running = {r.request_id for r in scheduler.running}
        output = scheduler.schedule()
        lost = [r.request_id for r in scheduler.requests.values() if r.num_preemptions > before[r.request_id]]
        self.preempted += lost
        self.check(lost, running)
        sampling = [
            name for name in output.num_scheduled_tokens if not scheduler.requests[name].is_prefill_chunk
        ]
        prompt_tokens = sum(t for n, t in output.num_scheduled_tokens.items() if t > 1)
        seconds = MACHINE.seconds(prompt_tokens, len(sampling), 0)
        self.batches.append((output, sampling, max(self.clock.now, self.free_at) + seconds))
        self.free_at = self.batches[-1][2]
        if len(self.batches) == self.under_way:
            self._complete()
        return output

    def _complete(self) -> None:
        from vllm.v1.outputs import ModelRunnerOutput

        output, sampling, done_at = self.batches.popleft()
        self.clock.now = done_at
        names = list(output.num_scheduled_tokens)
        results = self.scheduler.update_from_output(
            output,
            ModelRunnerOutput(
                req_ids=names,
                req_id_to_index={name: place for place, name in enumerate(names)},
                sampled_token_ids=[[self.count % 2_000] if name in sampling else [] for name in names],
            ),
        )
        for each in (one for batch in results.values() for one in batch.outputs):
            self.told.append(each.request_id)
            self.made[each.request_id] += [done_at] * len(each.new_token_ids)
            if each.finished:
                self.finished.add(each.request_id)

    def check(self, lost: list[str], running: set[str]) -> None:
        scheduler = self.scheduler
        policy = scheduler._step_policy
        assert set(policy.streams) == set(scheduler.requests)
        assert len(scheduler.running) <= SLOTS
        owed = {name for name, stream in policy.streams.items() if stream.owed}
        if any(name in owed for name in lost):
            assert not any(r.request_id in running - owed for r in scheduler.running), (
                "owed work lost to borrowed"
            )

    def finish(self, steps: int = 20_000) -> None:
        """Until all is done."""
        while len(self.finished) < len(self.requests):
            steps -= 1
            assert steps > 0, f"unfinished: {set(self.requests) - self.finished}"
            self.step()
        self.run(3)

    def rate(self, name: str, since: float) -> float:
        return sum(at > since for at in self.made[name]) / (self.clock.now - since)


@pytest.fixture(scope="module")
def vllm_config(demo_model: Path) -> VllmConfig:
    from vllm.engine.arg_utils import AsyncEngineArgs

    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
    return AsyncEngineArgs(
        model=str(demo_model),
        max_num_seqs=SLOTS,
        max_model_len=2_048,
        max_num_batched_tokens=2_048,
        block_size=KV_BLOCK,
        scheduler_cls="serving.step_scheduler.SeatScheduler",
    ).create_engine_config()


@pytest.fixture(params=["model runner V1", "V2"])
def new_stepper(
    vllm_config: VllmConfig, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Callable[..., Stepper]:
    """V2 is what runs on GPUs; vLLM's scheduler treats its requests otherwise in some places."""
    import torch
    from vllm.v1.kv_cache_interface import (
        FullAttentionSpec,
        KVCacheConfig,
        KVCacheGroupSpec,
        SlidingWindowSpec,
    )
    from vllm.v1.structured_output import StructuredOutputManager

    from serving.step_scheduler import SeatScheduler

    def new(kv_blocks: int = 1_000, step_tokens: int = 2_048, window: int | None = None) -> Stepper:
        """`window`: of half of the layers, in tokens."""
        table, path = StepTable.create(MACHINE, 1e9)
        for row in (SOLD, FREE, OTHER):
            table.write_seat(row, SeatRow(0.0, 1_000.0, 1.0, 1.0))
        monkeypatch.setenv(ENVIRONMENT, str(path))
        clock = Clock()
        monkeypatch.setattr("serving.step_scheduler.time", clock)
        vllm_config.cache_config.num_gpu_blocks = kv_blocks
        # Set back after the test: the configuration takes seconds to make, so all tests here share one.
        monkeypatch.setattr(vllm_config.scheduler_config, "max_num_batched_tokens", step_tokens)
        spec = FullAttentionSpec(block_size=KV_BLOCK, num_kv_heads=2, head_size=32, dtype=torch.float32)
        groups = [KVCacheGroupSpec(["layer"], spec)]
        if window is not None:
            sliding = SlidingWindowSpec(
                block_size=KV_BLOCK, num_kv_heads=2, head_size=32, dtype=torch.float32, sliding_window=window
            )
            groups.append(KVCacheGroupSpec(["sliding layer"], sliding))
        monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", str(int(request.param == "V2")))
        scheduler = SeatScheduler(
            vllm_config,
            KVCacheConfig(kv_blocks, [], groups),
            StructuredOutputManager(vllm_config),
            block_size=KV_BLOCK,
            log_stats=True,
        )
        path.unlink()
        assert scheduler.use_v2_model_runner == (request.param == "V2")
        return Stepper(scheduler, table, clock)

    return new


def test_held_requests_keep_their_slot_and_the_pace_is_kept(new_stepper: Callable[..., Stepper]) -> None:
    stepper = new_stepper()
    stepper.sell(420.0)
    owed = stepper.add(SOLD)
    borrowed = [stepper.add() for _ in range(SLOTS - 1)]
    stepper.run(50)
    since = stepper.clock.now
    held = []
    for _ in range(1_000):
        stepper.step()
        held.append(stepper.table.read().held)
        assert len(stepper.scheduler.running) == SLOTS
    # 2.38 ms have room for three.
    assert 3 <= sum(held) / len(held) <= 6
    assert 0.97 * 420.0 <= stepper.rate(owed, since) <= 1.1 * 420.0
    assert min(stepper.rate(name, since) for name in borrowed) > 30.0
    for name in stepper.requests:
        stepper.abort(name)
    stepper.run(3)
    assert stepper.table.read().held == 0


def test_an_owed_arrival_takes_the_slot_of_a_borrowed_one(new_stepper: Callable[..., Stepper]) -> None:
    stepper = new_stepper()
    stepper.sell(100.0)
    borrowed = [stepper.add(output=200) for _ in range(SLOTS)]
    stepper.run(20)
    owed = stepper.add(SOLD, output=50)
    assert owed in stepper.step().num_scheduled_tokens
    assert len(stepper.preempted) == 1
    assert stepper.preempted[0] in borrowed
    stepper.finish()
    assert stepper.table.read().preempted == 1
    assert {len(stepper.made[name]) for name in borrowed} == {200}
    assert len(stepper.made[owed]) == 50


def test_an_owed_arrival_finds_no_slot_among_owed_ones(new_stepper: Callable[..., Stepper]) -> None:
    stepper = new_stepper()
    stepper.sell(100.0, quantity=SLOTS)
    for _ in range(SLOTS):
        stepper.add(SOLD, output=100)
    stepper.run(10)
    stepper.sell(100.0, row=OTHER)
    stepper.add(OTHER, output=10)
    stepper.finish()
    assert stepper.preempted == []


def test_an_owed_prompt_is_read_at_its_rate_where_steps_have_few_tokens(
    new_stepper: Callable[..., Stepper],
) -> None:
    stepper = new_stepper(step_tokens=12)
    borrowed = [stepper.add() for _ in range(SLOTS - 1)]
    stepper.run(50)
    stepper.sell(10.0, prefill_tok_s=4_000.0)
    since = stepper.clock.now
    owed = stepper.add(SOLD, prompt=800, output=50)
    held = []
    while not stepper.made[owed]:
        stepper.step()
        held.append(stepper.table.read().held)
    # Beside all seven there would be 5 tokens in steps of 2.8 ms.
    assert stepper.made[owed][0] - since <= 800 / 4_000.0 + 0.02
    assert max(held) == 5
    since = stepper.clock.now
    stepper.run(100)
    assert stepper.table.read().held == 0
    assert all(stepper.rate(name, since) > 300.0 for name in borrowed)


def test_decodes_behind_a_prompt_get_their_token_in_every_step(new_stepper: Callable[..., Stepper]) -> None:
    """vLLM serves `running` in its order, and a borrowed prompt that was kept back stays in front of owed
    ones that came later: it must not eat the step's tokens."""
    stepper = new_stepper()
    stepper.sell(420.0, row=OTHER)
    first = stepper.add(OTHER)
    stepper.run(50)
    long = stepper.add(FREE, prompt=2_000)
    stepper.run(2)
    stepper.sell(420.0)
    late = stepper.add(SOLD, prompt=300)
    while not stepper.made[late]:
        stepper.step()
    assert not stepper.made[long], "the long prompt was to be still under way"
    passed_over = 0
    while not stepper.made[long]:
        scheduled = stepper.step().num_scheduled_tokens
        passed_over += late not in scheduled
        passed_over += first not in scheduled
    assert passed_over == 0


def test_a_first_token_is_told_before_the_others_next_ones(new_stepper: Callable[..., Stepper]) -> None:
    stepper = new_stepper()
    for _ in range(SLOTS - 1):
        stepper.add()
    stepper.run(10)
    late = stepper.add()
    stepper.told.clear()
    while late not in stepper.told:
        stepper.told.clear()
        stepper.step()
    assert stepper.told[0] == late
    assert len(stepper.told) == SLOTS


@pytest.mark.parametrize(
    ("outputs", "count", "told"),
    [("abCDE", 3, "CDEab"), ("aCbDe", 2, "CDabe"), ("abC", 2, "Cab"), ("", 1, "")],
)
def test_first_tokens_are_put_in_front_wherever_they_are(outputs: str, count: int, told: str) -> None:
    """Capitals: with few blocks prompts are not last, and one that was preempted tells of its prompt once."""
    from serving.step_scheduler import _put_first_tokens_first

    each: Any = [SimpleNamespace(name=n, prefill_stats=object() if n.isupper() else None) for n in outputs]
    _put_first_tokens_first(each, count)
    assert "".join(output.name for output in each) == told


def test_full_kv_cache_takes_from_borrowed_work_first(new_stepper: Callable[..., Stepper]) -> None:
    # 8 sequences of 408 tokens need 208 blocks.
    stepper = new_stepper(kv_blocks=120)
    stepper.sell(50.0, quantity=2)
    owed = [stepper.add(SOLD, output=400) for _ in range(2)]
    borrowed = [stepper.add(output=400) for _ in range(SLOTS - 2)]
    stepper.finish()
    assert stepper.preempted
    assert not set(stepper.preempted) & set(owed)
    assert {len(stepper.made[name]) for name in owed + borrowed} == {400}
    assert max(stepper.made[owed[0]]) < max(stepper.made[borrowed[-1]])
    assert stepper.scheduler._step_engine.free_blocks() == 119


def test_an_owed_prompt_takes_kv_cache_from_borrowed_work(new_stepper: Callable[..., Stepper]) -> None:
    stepper = new_stepper(kv_blocks=120)
    stepper.sell(50.0)
    for _ in range(4):
        stepper.add(prompt=300, output=200)
    stepper.run(60)
    assert stepper.scheduler._step_engine.free_blocks() < 50
    owed = stepper.add(SOLD, prompt=900, output=100)
    stepper.run(10)
    assert stepper.made[owed]
    stepper.finish()
    assert len(stepper.made[owed]) == 100


def test_nothing_is_taken_for_an_owed_prompt_that_would_not_fit_even_so(
    new_stepper: Callable[..., Stepper],
) -> None:
    stepper = new_stepper(kv_blocks=101)
    stepper.sell(50.0)
    stepper.sell(50.0, row=OTHER)
    large = stepper.add(OTHER, prompt=1_400, output=30)
    borrowed = [stepper.add(prompt=40, output=100) for _ in range(2)]
    stepper.run(10)
    owed = stepper.add(SOLD, prompt=320, output=5)
    later = stepper.add(prompt=8, output=5)
    stepper.run(15)
    assert stepper.preempted == [], "88 of 100 blocks are of owed work, and 20 are needed"
    assert stepper.made[later], "who fits need not wait behind it"
    assert not stepper.made[owed]
    while large not in stepper.finished:
        stepper.step()
    stepper.run(4)
    assert stepper.made[owed]
    assert not set(borrowed) & stepper.finished
    stepper.finish()


def test_an_owed_prompt_that_is_overdue_lets_nobody_pass(new_stepper: Callable[..., Stepper]) -> None:
    """A flooder whose every stream is owed for a while would keep it out for ever: one follows another."""
    stepper = new_stepper(kv_blocks=101)
    stepper.sell(50.0)
    stepper.sell(50.0, row=OTHER)
    flood = [stepper.add(OTHER, prompt=200, output=output) for output in (25, 50, 75, 100)]
    stepper.run(10)
    owed = stepper.add(SOLD, prompt=1_400, output=5, due_in=0.5)
    entered = 0
    for _ in range(2_000):
        stepper.step()
        if stepper.made[owed]:
            break
        for name in stepper.finished & set(flood):
            flood.remove(name)
            flood.append(stepper.add(OTHER, prompt=200, output=100))
            entered += 1
    assert stepper.made[owed]
    assert entered > 4


def test_layers_with_blocks_of_their_own_are_counted(new_stepper: Callable[..., Stepper]) -> None:
    stepper = new_stepper(kv_blocks=150, window=256)
    stepper.sell(50.0)
    borrowed = [stepper.add(prompt=400, output=200) for _ in range(2)]
    stepper.run(5)
    # 900 tokens that are read at once need 57 blocks of each kind.
    assert 57 <= stepper.scheduler._step_engine.free_blocks() < 114
    owed = stepper.add(SOLD, prompt=900, output=100)
    stepper.run(5)
    assert stepper.made[owed]
    assert set(stepper.preempted) == set(borrowed)
    stepper.finish()
    assert {len(stepper.made[name]) for name in borrowed} == {200}
    assert len(stepper.made[owed]) == 100
    assert stepper.scheduler._step_engine.free_blocks() == 149


def test_what_was_held_is_told_when_the_last_request_leaves(new_stepper: Callable[..., Stepper]) -> None:
    stepper = new_stepper()
    stepper.sell(420.0)
    for row in (SOLD, *[FREE] * (SLOTS - 1)):
        stepper.add(row)
    held_s, before = 0.0, stepper.clock.now
    for _ in range(100):
        stepper.step()
        held_s += stepper.scheduler._step_policy.held * (stepper.clock.now - before)
        before = stepper.clock.now
    for name in stepper.requests:
        stepper.abort(name)
    assert held_s > 0.3
    assert stepper.table.held_s(FREE) == pytest.approx(held_s, rel=0.1)


def test_what_the_prefix_cache_had_is_not_prefilled_for_the_policy(
    new_stepper: Callable[..., Stepper],
) -> None:
    stepper = new_stepper()
    tokens = list(range(500))
    stepper.add(tokens=tokens, output=5)
    stepper.finish()
    again = stepper.add(tokens=tokens, output=50)
    scheduled = stepper.step().num_scheduled_tokens
    assert scheduled[again] == 500 - 496
    stream = stepper.scheduler._step_policy.streams[again]
    assert (stream.decoding, stream.computed) == (True, 500)
    stepper.run(10)
    assert stream.computed == stepper.scheduler.requests[again].num_computed_tokens


def test_a_prefix_that_running_ones_hold_takes_no_kv_cache_from_them(
    new_stepper: Callable[..., Stepper],
) -> None:
    stepper = new_stepper(kv_blocks=100)
    stepper.sell(50.0)
    prefix = list(range(960))
    for number in range(3):
        stepper.add(tokens=[*prefix, number])
    stepper.run(30)
    owed = stepper.add(SOLD, tokens=[*prefix, 9], output=5)
    assert owed in stepper.step().num_scheduled_tokens
    assert stepper.preempted == [], "60 of its 61 blocks are there already"


def test_a_block_that_ends_makes_running_streams_borrowed(new_stepper: Callable[..., Stepper]) -> None:
    stepper = new_stepper()
    stepper.sell(480.0)
    stepper.add(SOLD)
    for _ in range(SLOTS - 1):
        stepper.add()
    stepper.run(100)
    assert stepper.table.read().held > 0
    stepper.sell(0.0)
    stepper.run(20)
    readings = stepper.table.read()
    assert (readings.held, readings.allowed_s) == (0, 0)


@pytest.mark.parametrize("under_way", [2, 1])
@pytest.mark.parametrize("seed", range(8))
def test_any_order_of_arrivals_and_ends_leaves_nothing_behind(
    new_stepper: Callable[..., Stepper], seed: int, under_way: int
) -> None:
    rng = random.Random(seed)
    kv_blocks = rng.choice((140, 1_000))
    stepper = new_stepper(kv_blocks)
    stepper.under_way = under_way
    prefix = [rng.randrange(2_000) for _ in range(200)]
    for _ in range(600):
        chance = rng.random()
        if chance < 0.15:
            tokens = prefix[: rng.randint(1, 200)] + [
                rng.randrange(2_000) for _ in range(rng.randint(1, 600))
            ]
            stepper.add(
                rng.choice((NOBODY, SOLD, FREE, OTHER)),
                tokens=tokens,
                output=rng.choice((1, 2, 20, 150, 400)),
            )
        elif chance < 0.18:
            stepper.sell(
                rng.choice((0.0, 20.0, 300.0, 480.0, 5_000.0)), rng.choice((SOLD, OTHER)), rng.randint(1, 3)
            )
        elif chance < 0.22 and (alive := sorted(set(stepper.requests) - stepper.finished)):
            stepper.abort(rng.choice(alive))
        stepper.step()
    stepper.sell(20.0)
    stepper.sell(0.0, OTHER)
    stepper.finish()
    for name, request in stepper.requests.items():
        made = len(stepper.made[name])
        assert made == request.max_tokens or request.status.name == "FINISHED_ABORTED"
    assert not stepper.scheduler._step_policy.streams
    assert stepper.scheduler._step_engine.free_blocks() == kv_blocks - 1
    readings = stepper.table.read()
    assert readings.held == 0
    assert readings.steps > 600


# --- what it was not written for -----------------------------------------------------------------


def test_another_vllm_is_refused_by_name(vllm_config: VllmConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    from serving import step_scheduler

    step_scheduler.refuse_unknown(vllm_config)
    monkeypatch.setattr(step_scheduler, "vllm_version", "0.33.0")
    with pytest.raises(ValueError, match=r"vLLM 0\.32\.x, not 0\.33\.0"):
        step_scheduler.refuse_unknown(vllm_config)


@pytest.mark.parametrize(
    ("place", "name", "value", "said"),
    [
        ("parallel_config", "pipeline_parallel_size", 2, "tensor parallelism"),
        ("parallel_config", "data_parallel_size", 2, "tensor parallelism"),
        ("scheduler_config", "policy", "priority", "--scheduling-policy"),
        ("scheduler_config", "enable_chunked_prefill", False, "--enable-chunked-prefill"),
        ("cache_config", "mamba_cache_mode", "align", "--no-enable-prefix-caching"),
        ("", "lora_config", object(), "neither LoRA adapters nor KV connectors"),
        ("", "kv_transfer_config", object(), "neither LoRA adapters nor KV connectors"),
    ],
)
def test_configurations_it_was_not_written_for_are_refused(
    vllm_config: VllmConfig, monkeypatch: pytest.MonkeyPatch, place: str, name: str, value: object, said: str
) -> None:
    from serving import step_scheduler

    step_scheduler.refuse_unknown(vllm_config)
    monkeypatch.setattr(getattr(vllm_config, place) if place else vllm_config, name, value)
    with pytest.raises(ValueError, match=said):
        step_scheduler.refuse_unknown(vllm_config)


def test_an_operators_own_scheduler_is_refused(tmp_path: Path, demo_model: Path) -> None:
    node = RunningNode(tmp_path, free_port(), free_port(), demo_model)
    node.publish()
    ended = run_serving(node, "--", "--scheduler-cls", "vllm.v1.core.sched.scheduler.Scheduler")
    assert ended.returncode == 1
    assert "--scheduler-cls is set by the node itself" in ended.stderr
