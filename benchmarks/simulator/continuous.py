"""vLLM's batching rules as an engine for experiments."""

from __future__ import annotations

from benchmarks.simulator.engine import KV_BLOCK, Batch, Engine, Rules, Stream
from benchmarks.simulator.entry import Take
from benchmarks.simulator.workloads import Request
from contract.step_time import StepTime


class ContinuousEngine:
    """Requests of a workload in the simulated vLLM."""

    batches_in_flight = Engine.batches_in_flight

    def __init__(self, step_time: StepTime, rules: Rules) -> None:
        self._engine = Engine(rules, step_time)
        self._requests: dict[int, Request] = {}
        self.preemptions = 0
        self.most_blocks = 0
        """Blocks of KV cache in use, at most, so far."""
        self.most_running = 0

    def compose(self, take: Take, now: float) -> Batch | None:
        """The next step, with those who enter: they fit if a slot and the blocks of their prompt are free."""
        room = _Room(self._engine)
        for request in take(room.fits):
            self._requests[request.number] = request
            self._engine.add(Stream(request.number, request.input_tokens, request.output_tokens), now)
        batch = self._engine.compose(now)
        if batch is not None:
            self.preemptions += len(batch.preempted)
        self.most_blocks = max(self.most_blocks, self._engine.blocks_in_use)
        self.most_running = max(self.most_running, len(self._engine.running))
        return batch

    def complete(self, batch: Batch, now: float) -> tuple[list[tuple[Request, int]], list[Request]]:
        done = self._engine.complete(batch, now)
        made = [(self._requests[part.key], part.made) for part in done if part.made]
        return made, [self._requests.pop(part.key) for part in done if part.finished]


class _Room:
    """What the running and the waiting leave free."""

    def __init__(self, engine: Engine) -> None:
        waiting = sum(_blocks(stream.input_tokens + stream.composed) for stream in engine.waiting)
        self._blocks = engine.rules.kv_blocks - engine.blocks_in_use - waiting
        self._slots = engine.rules.slots - len(engine.running) - len(engine.waiting)

    def fits(self, request: Request) -> bool:
        """Whether one more fits; if so it has the room from now on."""
        blocks = _blocks(request.input_tokens)
        if self._slots < 1 or blocks > self._blocks:
            return False
        self._slots -= 1
        self._blocks -= blocks
        return True


def _blocks(tokens: int) -> int:
    return -(-tokens // KV_BLOCK)
