"""Arranges the engine for its next step as the step policy has chosen: who is held, who gives way to owed
requests, and in which order slots, KV cache and the step's tokens are given out.

An engine is vLLM's scheduler (`serving.step_scheduler`) or the simulated one; both do what is decided here.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Protocol

from scheduler.steps import StepPolicy
from scheduler.streams import Stream


class StepEngine(Protocol):
    """What an engine tells and does. Sequences that run have a slot; KV cache is counted in blocks."""

    step_tokens: int
    """The most that a step computes, prompts and decodes together."""
    decode_tokens: int
    """How many of them a decode takes."""

    def ready(self, stream_id: Hashable) -> bool:
        """Whether the waiting sequence could begin in the next step."""

    def hold(self, stream_id: Hashable, held: bool) -> None:
        """Leave the running sequence out of all steps, or no more."""

    def running_count(self) -> int:
        """How many run."""

    def running_ids(self) -> list[Hashable]:
        """Who runs."""

    def free_slots(self) -> int:
        """How many more could run."""

    def free_blocks(self) -> int:
        """Blocks that a waiting sequence could have."""

    def blocks(self, tokens: int) -> int:
        """The most blocks that so many tokens of one sequence need."""

    def blocks_for(self, stream_id: Hashable, enough: int) -> int:
        """What the waiting sequence needs to be read; if that is `enough` at most, a bound of it will do."""

    def fits_beside(self, stream_id: Hashable, more: int, running_ids: list[Hashable]) -> bool:
        """Whether the waiting sequence could be read, and `more` blocks be had, if only these had any."""

    def preempt(self, stream_id: Hashable, now: float) -> bool:
        """Take the running sequence's slot and KV cache; False if that is not possible now."""

    def put_first(self, stream_ids: list[Hashable]) -> None:
        """Let these be the first of the waiting, in this order."""

    def put_last(self, stream_ids: list[Hashable]) -> None:
        """Let these be the last of the waiting, in this order."""

    def serve_by(self, rank: Callable[[Hashable], Any]) -> None:
        """Serve the running by rank. KV cache is taken from the end."""

    def serve_last(self, stream_ids: list[Hashable]) -> None:
        """Serve these running ones after the others, in this order."""


def arrange(policy: StepPolicy, engine: StepEngine, now: float) -> int:
    """Prepare the next step; the most tokens that it may take."""
    owed = policy.prompts.owed_waiting()
    for stream in owed:
        stream.ready = engine.ready(stream.stream_id)
    plan = policy.plan(now)
    for stream in plan.changed:
        engine.hold(stream.stream_id, stream.held)
    tokens = engine.step_tokens
    if plan.prefill_tokens is not None:
        decodes = (engine.running_count() - policy.held) * engine.decode_tokens
        tokens = min(tokens, max(1, decodes + plan.prefill_tokens))
    if owed:
        _make_way(policy, engine, owed, now)
    # Each may begin a block.
    if engine.free_blocks() < engine.running_count() * engine.blocks(1) + engine.blocks(tokens):
        engine.serve_by(policy.rank)
    elif policy.prompts.streams:
        # A prompt in front would take all of a step's tokens.
        engine.serve_last(policy.prompts.in_order())
    return tokens


def _make_way(policy: StepPolicy, engine: StepEngine, owed: list[Stream], now: float) -> None:
    """Put owed sequences first, with the slots and KV cache of borrowed ones if they need it. If all of that
    is too little for one, it lets the others pass until its first token is due, and nobody from then on."""
    owed.sort(key=lambda stream: stream.due)
    first: list[Hashable] = []
    last: list[Hashable] = []
    places = _Places(policy, engine, now)
    blocked = False
    for stream in owed:
        if stream.ready and not blocked and not places.give(stream.stream_id):
            if stream.due > now:
                last.append(stream.stream_id)
                continue
            blocked = True
        first.append(stream.stream_id)
    engine.put_first(first)
    engine.put_last(last)


class _Places:
    """The slots and KV cache that owed sequences are given in one step."""

    def __init__(self, policy: StepPolicy, engine: StepEngine, now: float) -> None:
        self._policy = policy
        self._engine = engine
        self._now = now
        self._slots = 0
        self._blocks = 0

    def give(self, stream_id: Hashable) -> bool:
        """A place for this one too, if need be by taking theirs from borrowed ones; False, and nothing is
        taken, if there would be too little KV cache without any of them."""
        engine = self._engine
        if self._kv_is_short(stream_id):
            owed = [each for each in engine.running_ids() if self._policy.streams[each].owed]
            if not engine.fits_beside(stream_id, self._blocks + engine.blocks(len(owed)), owed):
                return False
        # Asked anew each time: what it shares with a borrowed one it needs for itself when that has lost it.
        while engine.free_slots() <= self._slots or self._kv_is_short(stream_id):
            victim = self._policy.victim(engine.running_ids())
            if victim is None or not engine.preempt(victim, self._now):
                break
        self._slots += 1
        self._blocks += self._needed(stream_id)
        return True

    def _kv_is_short(self, stream_id: Hashable) -> bool:
        # With what the running ones take in the same step, before the waiting come to their turn: seldom do
        # many begin a block together.
        running = self._engine.blocks(self._engine.running_count())
        return self._blocks + self._needed(stream_id) + running > self._engine.free_blocks()

    def _needed(self, stream_id: Hashable) -> int:
        return self._engine.blocks_for(stream_id, self._engine.free_blocks() - self._blocks)
