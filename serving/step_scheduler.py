"""The step scheduler: the step policy in the place of vLLM's own choice of batch. Written for vLLM 0.32.

It runs in EngineCore, chosen by `--scheduler-cls`, and only adapts: `scheduler.steps.StepPolicy` decides.

* To hold a request, its `next_decode_eligible_step` is set beyond every step: vLLM then passes over it and
  keeps it in `running`, so that its slot and KV cache stay counted, and it can still be a victim.
* vLLM takes KV cache from the end of `running`; while it is short, `running` is sorted so that the end is the
  borrowed request that is furthest ahead.
* An owed request that finds no slot or no KV cache takes them from borrowed ones, by vLLM's own preemption.
* Prompts are limited by `max_num_scheduled_tokens`, per step.
"""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import Any

from vllm import __version__ as vllm_version
from vllm.config import VllmConfig
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.engine import EngineCoreOutput
from vllm.v1.request import Request, RequestStatus

from scheduler.step_time import StepTimeFit
from scheduler.steps import StepPolicy
from scheduler.streams import Stream
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
        _refuse_unknown(vllm_config)
        super().__init__(vllm_config, *args, **kwargs)
        self._table = StepTable.open(Path(os.environ[ENVIRONMENT]))
        seed, samples = self._table.seed()
        self._step_policy = StepPolicy(
            StepTimeFit(seed, seed_samples=samples),
            # A decode takes that many of them.
            step_tokens=self.max_num_scheduled_tokens // (1 + self.num_spec_tokens),
        )
        self._rows: dict[int, SeatRow] = {}
        """What the policy was told of the seats that it knows."""
        self._trusted = 0.0
        self._most_tokens = self.max_num_scheduled_tokens
        self._block_pool = self.kv_cache_manager.block_pool
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
            self._publish()
        self._own_s += time.thread_time() - began
        return super()._free_request(request, delay_free_blocks)

    def _preempt_request(self, request: Request, timestamp: float, drop_stale_output: bool = False) -> None:
        super()._preempt_request(request, timestamp, drop_stale_output)
        request.next_decode_eligible_step = 0
        self._step_policy.preempted(request.request_id, request.num_tokens, timestamp)
        self._preempted += 1

    # --- each step ---------------------------------------------------------------------------------

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        began = time.thread_time()
        self._prepare(time.monotonic())
        own_s = time.thread_time() - began
        try:
            output = super().schedule(throttle_prefills)
        finally:
            self.max_num_scheduled_tokens = self._most_tokens
        began = time.thread_time()
        self._tell_cached(output)
        self._step_policy.composed(output.num_scheduled_tokens, time.monotonic())
        # Admission goes by it; the rest is for those who watch.
        self._table.limit_borrowed(self._step_policy.borrowed_limit)
        if self._until_refresh == _REFRESH_STEPS:
            self._publish()
        self._own_times.append(self._own_s + own_s + time.thread_time() - began)
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

    def _prepare(self, now: float) -> None:
        policy = self._step_policy
        self._until_refresh -= 1
        if self._until_refresh <= 0:
            self._until_refresh = _REFRESH_STEPS
            self._refresh_seats()
        owed = policy.prompts.owed_waiting()
        for stream in owed:
            stream.ready = self.requests[str(stream.stream_id)].status in _READY
        plan = policy.plan(now)
        for stream in plan.changed:
            self.requests[str(stream.stream_id)].next_decode_eligible_step = _NEVER if stream.held else 0
        if plan.prefill_tokens is not None:
            decodes = (len(self.running) - policy.held) * (1 + self.num_spec_tokens)
            self.max_num_scheduled_tokens = min(self._most_tokens, max(1, decodes + plan.prefill_tokens))
        if owed:
            self._make_way(owed, now)
        if self._free_blocks_left() < len(self.running) + self._blocks(self.max_num_scheduled_tokens):
            self.running.sort(key=lambda request: policy.rank(request.request_id))
        elif policy.prompts.streams:
            self._put_prompts_last()

    def _make_way(self, streams: list[Stream], now: float) -> None:
        """Put owed requests first, and give them the slots and KV cache of borrowed ones if they need it."""
        streams.sort(key=lambda stream: stream.due)
        owed = [self.requests[str(stream.stream_id)] for stream in streams]
        ready = [each for each in owed if each.status in _READY]
        slots = len(ready) - (self.max_num_active_reqs - len(self.running))
        while slots > 0 or self._short_of_blocks(ready):
            victim_id = self._step_policy.victim(each.request_id for each in self.running)
            if victim_id is None or not self._request_blocks_can_be_freed(
                victim := self.requests[str(victim_id)]
            ):
                break
            self.running.remove(victim)
            self._preempt_request(victim, now)
            slots -= 1
        # Without KV connectors, which are refused at start, all that have not begun wait in this one queue.
        for request in reversed(owed):
            self.waiting.remove_request(request)
            self.waiting.prepend_request(request)

    def _put_prompts_last(self) -> None:
        """vLLM gives a step's tokens out in this order, and a prompt in front would take them all."""
        prompts = [self.requests[str(stream_id)] for stream_id in self._step_policy.prompts.in_order()]
        if prompts and self.running[-len(prompts) :] != prompts:
            last = set(prompts)
            self.running = [request for request in self.running if request not in last] + prompts

    def _free_blocks_left(self) -> int:
        return int(self._block_pool.get_num_free_blocks())

    def _short_of_blocks(self, ready: list[Request]) -> bool:
        # With what the running ones take of it in the same step, before these come to their turn.
        needed = self._blocks(len(self.running)) + int(self.kv_cache_manager.watermark_blocks)
        needed += sum(self._blocks(each.num_tokens) + 1 for each in ready)
        free = self._free_blocks_left()
        return free < needed and free < needed - sum(self._blocks_shared(each) for each in ready)

    def _blocks_shared(self, request: Request) -> int:
        """Of the blocks that the request needs, those that running ones hold: their common prefix."""
        hits, *_ = self.kv_cache_manager.get_computed_blocks(request)
        return sum(block.ref_cnt > 0 for block in hits.blocks[0])

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

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
        for row, seat in list(self._step_policy.seats.items()):
            assert isinstance(row, int)
            if seat.held_s:
                self._table.add_held(row, seat.held_s)
                seat.held_s = 0.0
            if seat.streams:
                self._read_seat(row)
            else:
                self._step_policy.forget_seat(row)
                del self._rows[row]

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


def _refuse_unknown(config: VllmConfig) -> None:
    """Raise ValueError, saying why, for what this file was not written for."""
    if not vllm_version.startswith(VLLM_VERSIONS):
        raise ValueError(f"the step scheduler extends vLLM {VLLM_VERSIONS}x, not {vllm_version}")
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
    if config.lora_config is not None or config.kv_transfer_config is not None:
        raise ValueError("the step scheduler knows neither LoRA adapters nor KV connectors; leave them out")
