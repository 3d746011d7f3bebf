"""The production step policy in the simulated engine.

`scheduler.arrange` prepares its steps as it does vLLM's; here is what the simulated engine does for that.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

from benchmarks.simulator.engine import KV_BLOCK, Batch, Engine, Stream
from scheduler.arrange import arrange
from scheduler.steps import StepPolicy


class SeatComposer:
    """Revocable borrowed work: held between steps, preempted for owed work that needs its place."""

    def __init__(self, policy: StepPolicy) -> None:
        self._policy = policy
        self._streams: dict[Hashable, Stream] = {}

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
        return arrange(self._policy, _StepEngine(engine, self._streams), now)

    def composed(self, batch: Batch, now: float) -> None:
        for piece in batch.pieces:
            cached = piece.upto - piece.tokens
            # Only a stream that starts, or starts again, has computed just what the prefix cache had.
            if cached and cached == piece.stream.cached_tokens:
                self._policy.cached(piece.stream.key, cached)
        self._policy.composed({piece.stream.key: piece.tokens for piece in batch.pieces}, now)

    def completed(self, now: float) -> None:
        self._policy.completed(now)


class _StepEngine:
    """The simulated engine as `scheduler.arrange.StepEngine`."""

    decode_tokens = 1

    def __init__(self, engine: Engine, streams: dict[Hashable, Stream]) -> None:
        self._engine = engine
        self._streams = streams
        self.step_tokens = engine.rules.step_tokens

    def ready(self, stream_id: Hashable) -> bool:
        return self._streams[stream_id].ready

    def hold(self, stream_id: Hashable, held: bool) -> None:
        self._streams[stream_id].held = held

    def running_count(self) -> int:
        return len(self._engine.running)

    def running_ids(self) -> list[Hashable]:
        return [stream.key for stream in self._engine.running]

    def free_slots(self) -> int:
        return self._engine.rules.slots - len(self._engine.running)

    def free_blocks(self) -> int:
        return self._engine.free_blocks

    def blocks(self, tokens: int) -> int:
        return -(-tokens // KV_BLOCK)

    def blocks_for(self, stream_id: Hashable, enough: int) -> int:
        stream = self._streams[stream_id]
        return self.blocks(stream.input_tokens + stream.composed - stream.cached_tokens)

    def fits_beside(self, stream_id: Hashable, more: int, running_ids: list[Hashable]) -> bool:
        held = sum(self._streams[each].blocks for each in running_ids)
        return self.blocks_for(stream_id, 0) + more + held <= self._engine.rules.kv_blocks

    def preempt(self, stream_id: Hashable, now: float) -> bool:
        self._engine.preempt(self._streams[stream_id], now)
        return True

    def put_first(self, stream_ids: list[Hashable]) -> None:
        for stream in [self._streams[each] for each in reversed(stream_ids)]:
            self._engine.waiting.remove(stream)
            self._engine.waiting.appendleft(stream)

    def put_last(self, stream_ids: list[Hashable]) -> None:
        for stream in [self._streams[each] for each in stream_ids]:
            self._engine.waiting.remove(stream)
            self._engine.waiting.append(stream)

    def serve_by(self, rank: Callable[[Hashable], Any]) -> None:
        self._engine.running.sort(key=lambda stream: rank(stream.key))

    def serve_last(self, stream_ids: list[Hashable]) -> None:
        last = set(stream_ids)
        running = [stream for stream in self._engine.running if stream.key not in last]
        self._engine.running = running + [self._streams[each] for each in stream_ids]
