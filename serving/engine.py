"""The engine client with seats. Written for vLLM 0.32, whose classes it extends at two points:

* `AsyncLLM.generate` is the one door of every text endpoint, after tokenisation and before dispatch:
  here a prompt waits for its place.
* `OutputProcessor.process_outputs` sees every step's new tokens, whether or not the client reads or
  streams them: here they are counted.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from vllm.inputs import TokensPrompt
from vllm.outputs import RequestOutput
from vllm.platforms import current_platform
from vllm.sampling_params import SamplingParams
from vllm.utils import length_from_prompt_token_ids_or_embeds
from vllm.v1.engine import EngineCoreOutput
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.output_processor import OutputProcessor, OutputProcessorOutput

from scheduler import Ask, Capacity, Ticket
from serving.node import Node, RefusedError, StepOutput, current_verdict, engine_request_id
from serving.step_scheduler import DUE, SEAT

VLLM_VERSIONS = "0.32."
"""The versions this file was written for; `launch` refuses others."""

_MEASURED_PROMPT = 2_048
_MEASURE_S = 20.0
"""Measuring begins no further batch after this long."""

_ENGINE_OPTIONS = (
    "lora_request",
    "tokenization_kwargs",
    "prompt_text",
    "reasoning_ended",
    "reasoning_parser_kwargs",
)
"""What of vLLM's own options goes on to the engine: nothing that a client could set to jump the queue."""


class SeatLLM(AsyncLLM):
    """vLLM's engine client, whose `generate` waits for admission.

    `node` is set by `launch` once the engine has told how much it holds, before the first request.
    """

    node: Node
    _metered = False

    def capacity(self) -> Capacity:
        """What the running engine can hold at once."""
        kv_tokens = self.vllm_config.cache_config.kv_cache_size_tokens
        assert kv_tokens is not None, "EngineCore tells it when it is ready"
        return Capacity(
            slots=self.scheduler_config.max_num_seqs,
            # As vLLM reckons it: layers of several kinds share the blocks.
            kv_tokens=kv_tokens,
            step_tokens=self.scheduler_config.max_num_batched_tokens,
        )

    async def warm_up(self) -> None:
        """Have the engine compile now what it would compile in front of the first client that asks for it.

        The kernel behind log probabilities takes 12 s on a small CPU, and every seat's streams stand
        still meanwhile.
        """
        prompt = TokensPrompt(prompt_token_ids=[0])
        params = SamplingParams(max_tokens=2, logprobs=1)
        async for _ in super().generate(prompt, params, "warm-up"):
            pass

    async def measure(self) -> bool:
        """Run batches of many sizes, from which the step scheduler learns the machine's step time; False if
        the machine is too slow to run them all in reasonable time, or the engine is stopped meanwhile."""
        slots = self.scheduler_config.max_num_seqs
        length = min(_MEASURED_PROMPT, self.model_config.max_model_len // 2)
        give_up_at = time.monotonic() + _MEASURE_S
        batches = [(1, 1, 16), (1, length, 1), (slots, 16, 24), (1, length, 1), (min(8, slots), length, 24)]
        batches += [(count, 16, 24) for count in (1, slots // 8, slots // 2) if count] + [(1, length, 1)] * 2
        for number, (count, input_tokens, output_tokens) in enumerate(batches):
            if time.monotonic() > give_up_at:
                return False
            complete = await asyncio.gather(
                *(
                    self._run_once(f"measure-{number}-{place}", input_tokens, output_tokens)
                    for place in range(count)
                )
            )
            if not all(complete):
                return False
        return True

    async def _run_once(self, request_id: str, input_tokens: int, output_tokens: int) -> bool:
        """One request of random tokens, others each time, so that no prefix cache shortens it; False if an
        engine that is being stopped cut it short."""
        vocabulary = self.model_config.get_vocab_size()
        tokens = [random.randrange(vocabulary) for _ in range(input_tokens)]
        params = SamplingParams(max_tokens=output_tokens, ignore_eos=True, detokenize=False)
        reason = None
        async for output in super().generate(TokensPrompt(prompt_token_ids=tokens), params, request_id):
            reason = output.outputs[0].finish_reason
        return reason == "length"

    async def generate(
        self, prompt: Any, sampling_params: SamplingParams, request_id: str, **options: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        # Not one of vLLM's many keyword parameters by name: those that may pass are listed once, above.
        verdict = current_verdict.get()
        options = {name: options[name] for name in _ENGINE_OPTIONS if name in options}
        # A prefix cache of its own for each pledge: hits, which the answer's usage and its speed tell of,
        # must not show what other customers ask (CVE-2025-46570).
        prompt["cache_salt"] = verdict.pledge.pledge_id
        try:
            async with (
                self.node.enter(verdict, _ask(prompt, sampling_params)) as ticket,
                aclosing(
                    super().generate(
                        prompt, self._marked(sampling_params, ticket), engine_request_id(ticket), **options
                    )
                ) as outputs,
            ):
                async for output in outputs:
                    yield output
        except RefusedError:
            # To vLLM a refused request is one whose client left: it unwinds without an answer of its
            # own and without a log entry. The gateway gives the answer.
            raise asyncio.CancelledError from None

    def _marked(self, params: SamplingParams, ticket: Ticket) -> SamplingParams:
        """Tell the step scheduler whose request it is, and when its first token is due. Clients' own extra
        arguments never get here."""
        if current_platform.is_cpu():
            # vLLM 0.32's CPU engine dies of a seed when the prompt is computed in more than one step
            # (a CPU generator has no offset to set back), and any prompt may be here.
            params.seed = None
        if self.node.rows is not None:
            row = self.node.rows.row(ticket.seat.terms.seat_id)
            params.extra_args = {SEAT: row, DUE: ticket.due}
        return params

    def _run_output_handler(self) -> None:
        # Before vLLM's loop takes its reference to the processor.
        if not self._metered:
            self._metered = True
            _meter(self.output_processor, self)
        super()._run_output_handler()

    def shutdown(self, timeout: float | None = None) -> None:
        """Called by vLLM off the event loop on SIGTERM: the queue goes back to its clients, what runs
        has `timeout` seconds to finish."""
        node = getattr(self, "node", None)
        if node is not None and not node.admission.draining:
            node.loop.call_soon_threadsafe(node.drain)
        super().shutdown(timeout)


def _ask(prompt: Any, params: SamplingParams) -> Ask:
    input_tokens = length_from_prompt_token_ids_or_embeds(
        prompt.get("prompt_token_ids"), prompt.get("prompt_embeds")
    )
    return Ask(input_tokens, max(1, params.max_tokens or 1), params.n)


def _meter(processor: OutputProcessor, engine: SeatLLM) -> None:
    """Let `engine.node` see every step that `processor` handles."""
    process_outputs = processor.process_outputs
    states, external_ids = processor.request_states, processor.external_req_ids

    def metered(
        outputs: list[EngineCoreOutput], made_at: float | None = None, *args: Any, **kwargs: Any
    ) -> OutputProcessorOutput:
        # Which request it is and how many tokens the engine made is known before vLLM has trimmed
        # tokens behind a stop string and forgotten what is finished.
        steps = [
            StepOutput(
                states[output.request_id].external_req_id, len(output.new_token_ids), _cached_tokens(output)
            )
            for output in outputs
            if output.request_id in states
        ]
        unfinished = len(states)
        result = process_outputs(outputs, made_at, *args, **kwargs)
        finished = (
            [step.request_id for step in steps if step.request_id not in external_ids]
            if len(states) < unfinished
            else ()
        )
        engine.node.record_step(steps, finished, made_at)
        return result

    # On the instance: vLLM builds its processor itself, and its loop looks the method up there.
    processor.process_outputs = metered  # type: ignore[method-assign, assignment]


def _cached_tokens(output: EngineCoreOutput) -> int:
    return 0 if output.prefill_stats is None else output.prefill_stats.num_cached_tokens
