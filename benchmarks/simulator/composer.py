"""The production step policy in the simulated engine.

Does with the simulated engine what `serving/step_scheduler.py` does with vLLM's scheduler; the decisions are
`scheduler.steps.StepPolicy`'s, unchanged.
"""

from __future__ import annotations

from collections.abc import Hashable

from benchmarks.simulator.engine import KV_BLOCK, Batch, Engine, Stream
from scheduler.steps import StepPolicy


class SeatComposer:
    """Revocable borrowed work: held between steps, preempted for owed work that needs its place."""

    def __init__(self, policy: StepPolicy) -> None:
        self._policy = policy
        self._streams: dict[int, Stream] = {}

    def entered(self, stream: Stream, now: float) -> None:
        self._streams[stream.key] = stream
        self._policy.enter(stream.key, stream.seat_id, stream.input_tokens, stream.due, now)

    def left(self, stream: Stream, now: float) -> None:
        del self._streams[stream.key]
        self._policy.leave(stream.key, now)

    def preempted(self, stream: Stream, now: float) -> None:
        stream.held = False
        self._policy.preempted(stream.key, stream.input_tokens + stream.composed, now)

    def prepare(self, engine: Engine, now: float) -> int:
        for stream in engine.waiting:
            self._policy.streams[stream.key].ready = stream.ready
        plan = self._policy.plan(now)
        for changed in plan.changed:
            self._stream(changed.stream_id).held = changed.held
        budget = engine.rules.step_tokens
        if plan.prefill_tokens is not None:
            decodes = len(engine.running) - self._policy.held
            budget = min(budget, max(1, decodes + plan.prefill_tokens))
        if engine.waiting:
            self._make_way(engine, now)
        if engine.free_blocks < len(engine.running) + _blocks(budget):
            engine.running.sort(key=lambda stream: self._policy.rank(stream.key))
        else:
            # A step's tokens are given out in this order, and a prompt in front would take them all.
            prompts = self._policy.prompts.in_order()
            last = set(prompts)
            engine.running = [stream for stream in engine.running if stream.key not in last]
            engine.running += [self._stream(stream_id) for stream_id in prompts]
        return budget

    def composed(self, batch: Batch, now: float) -> None:
        for piece in batch.pieces:
            cached = piece.upto - piece.tokens
            # Only a stream that starts, or starts again, has computed just what the prefix cache had.
            if cached and cached == piece.stream.cached_tokens:
                self._policy.cached(piece.stream.key, cached)
        self._policy.composed({piece.stream.key: piece.tokens for piece in batch.pieces}, now)

    def completed(self, now: float) -> None:
        self._policy.completed(now)

    def _make_way(self, engine: Engine, now: float) -> None:
        """Put owed streams first, and give them the slots and KV cache of borrowed ones if they need it."""
        owed = [stream for stream in engine.waiting if self._policy.streams[stream.key].owed]
        if not owed:
            return
        owed.sort(key=lambda stream: self._policy.streams[stream.key].due)
        ready = [stream for stream in owed if stream.ready]
        slots = len(ready) - (engine.rules.slots - len(engine.running))
        kv_blocks = sum(_blocks(stream.input_tokens + stream.composed) + 1 for stream in ready)
        kv_blocks += _blocks(len(engine.running))
        while slots > 0 or engine.free_blocks < kv_blocks:
            victim = self._policy.victim(stream.key for stream in engine.running)
            if victim is None:
                break
            engine.preempt(self._stream(victim), now)
            slots -= 1
        for stream in reversed(owed):
            engine.waiting.remove(stream)
            engine.waiting.appendleft(stream)

    def _stream(self, stream_id: Hashable) -> Stream:
        assert isinstance(stream_id, int)
        return self._streams[stream_id]


def _blocks(tokens: int) -> int:
    return -(-tokens // KV_BLOCK)
