"""The simulated engine, by vLLM V1's batching rules.

A step takes first the running sequences, in order of entry, then the waiting ones that are ready, first come
first served, while the token budget, the slots and the KV cache last. Prompts are prefilled in chunks; a
sequence makes one token in every step that computes all it has. KV cache is held in blocks. When a running
sequence finds no free block, the last of the running is preempted: it loses what it has computed, goes back
to the head of the waiting, and nobody who waits enters in that step. The next step is composed while the one
before runs, so a request that arrives during step k takes part in step k+2 at the earliest, and a sequence
that ends by itself is still part of one step more, in vain; one that ends by its `max_tokens` is not.

Simplified: sequences of one prompt (`n`) share its blocks, which are counted at the first of them, and the
others begin once its prefill has been composed. A prefix that another request left in the cache takes no
blocks.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Protocol

from contract.step_time import StepTime

KV_BLOCK = 16
"""Tokens in one block of KV cache."""


@dataclass(frozen=True, slots=True)
class Rules:
    """The limits of one engine."""

    slots: int
    """Sequences that run together (`max_num_seqs`)."""
    kv_tokens: int
    step_tokens: int = 2_048
    """Tokens in one step (`max_num_batched_tokens`)."""

    @property
    def kv_blocks(self) -> int:
        return self.kv_tokens // KV_BLOCK


class Stream:
    """One sequence in the engine. Only `Engine` writes it, but for `held`.

    Invariants: `made <= composed <= max_tokens`; a stream that waits is not held and has no blocks.
    """

    __slots__ = (
        "blocks",
        "cached_tokens",
        "composed",
        "computed",
        "due",
        "gone",
        "held",
        "input_tokens",
        "key",
        "leader",
        "made",
        "max_tokens",
        "output_tokens",
        "reached",
        "running",
        "seat_id",
    )

    def __init__(
        self,
        key: int,
        input_tokens: int,
        output_tokens: int,
        *,
        seat_id: str = "",
        due: float = math.inf,
        max_tokens: int | None = None,
        cached_tokens: int = 0,
        leader: Stream | None = None,
    ) -> None:
        self.key = key
        self.seat_id = seat_id
        self.due = due
        """When its first token is; the engine does not know."""
        self.input_tokens = input_tokens
        self.output_tokens = output_tokens
        """Tokens after which it ends by itself; the engine does not know."""
        self.max_tokens = max_tokens or output_tokens
        self.leader = leader
        """The first sequence of the same prompt; None for that one itself."""
        shared = (input_tokens - 1) // KV_BLOCK * KV_BLOCK
        self.cached_tokens = min(cached_tokens, input_tokens - 1) if leader is None else shared
        """Tokens that are in the cache already."""
        self.computed = 0
        """Tokens whose keys and values are, or will be once all composed steps have run, in the cache."""
        self.reached = input_tokens if leader is not None else self.cached_tokens
        """Prompt tokens computed for the first time, here or by its leader."""
        self.composed = 0
        """Output tokens of all steps composed so far."""
        self.made = 0
        self.blocks = 0
        self.running = False
        self.held = False
        """It takes no part in steps, and keeps its KV cache. Written by the composer."""
        self.gone = False

    @property
    def left(self) -> int:
        """Tokens that it has and that are not computed: 1 while it decodes."""
        return self.input_tokens + self.composed - self.computed

    @property
    def ready(self) -> bool:
        """Whether it can be computed: no token of it is on its way from before a preemption, and its leader's
        prompt has been composed."""
        leader = self.leader
        return self.composed == self.made and (leader is None or leader.gone or leader.composed > 0)

    @property
    def decoding(self) -> bool:
        return self.computed >= self.input_tokens


class Piece:
    """One sequence's part in one step."""

    __slots__ = ("makes", "stream", "tokens", "upto")

    def __init__(self, stream: Stream, tokens: int, makes: bool) -> None:
        self.stream = stream
        self.tokens = tokens
        self.makes = makes
        self.upto = stream.computed
        """Computed tokens once the step has run."""


@dataclass(frozen=True, slots=True)
class Batch:
    """One composed step."""

    seconds: float
    pieces: tuple[Piece, ...]
    prefill_tokens: int
    decodes: int
    kv_tokens: int
    preempted: tuple[int, ...]
    """Keys of the sequences that were preempted when it was composed."""


@dataclass(frozen=True, slots=True)
class Done:
    """What one step brought for one sequence."""

    key: int
    prefilled: int
    """Prompt tokens computed for the first time."""
    made: int
    finished: bool


class Composer(Protocol):
    """A step policy in the engine: it hears of every stream, and prepares every step.

    Preparing, it may hold running streams and free them, reorder the running and the waiting, and preempt.
    """

    def entered(self, stream: Stream, now: float) -> None:
        """The stream has come to wait for its first step."""

    def left(self, stream: Stream, now: float) -> None:
        """The stream is over."""

    def preempted(self, stream: Stream, now: float) -> None:
        """The stream lost its KV cache and waits again."""

    def prepare(self, engine: Engine, now: float) -> int:
        """Before a step is composed; returns the most tokens it may take."""

    def composed(self, batch: Batch, now: float) -> None:
        """The step is composed and on its way."""

    def completed(self, now: float) -> None:
        """The oldest composed step is done; its tokens are not yet known."""


class PlainVllm:
    """Everything that runs takes part."""

    def entered(self, stream: Stream, now: float) -> None:
        """Nothing is kept."""

    def left(self, stream: Stream, now: float) -> None:
        """Nothing is kept."""

    def preempted(self, stream: Stream, now: float) -> None:
        """Nothing is kept."""

    def prepare(self, engine: Engine, now: float) -> int:
        return engine.rules.step_tokens

    def composed(self, batch: Batch, now: float) -> None:
        """Nothing is kept."""

    def completed(self, now: float) -> None:
        """Nothing is kept."""


class Engine:
    """The batch of one engine.

    Invariants: the streams running never exceed the slots, nor their blocks the KV cache; a stream that was
    removed takes part in no later step, and what a composed step makes for it is lost.
    """

    batches_in_flight = 2

    def __init__(self, rules: Rules, step_time: StepTime, composer: Composer | None = None) -> None:
        self.rules = rules
        self.slowdown = 1.0
        """Factor on every step's duration: a throttled machine."""
        self._step_time = step_time
        self._composer = composer or PlainVllm()
        self.running: list[Stream] = []
        """In order of entry, unless the composer has sorted them; KV cache is taken from the end."""
        self.waiting: deque[Stream] = deque()
        self.blocks_in_use = 0
        self._streams: dict[int, Stream] = {}
        self._preempted: list[Stream] = []
        """Since the last step was composed."""

    @property
    def free_blocks(self) -> int:
        return self.rules.kv_blocks - self.blocks_in_use

    def add(self, stream: Stream, now: float) -> None:
        self._streams[stream.key] = stream
        self.waiting.append(stream)
        self._composer.entered(stream, now)

    def remove(self, key: int, now: float) -> None:
        """The stream is over; nothing happens if it is not here."""
        stream = self._streams.pop(key, None)
        if stream is None:
            return
        stream.gone = True
        if stream.running:
            self.running.remove(stream)
        else:
            self.waiting.remove(stream)
        self._free(stream)
        self._composer.left(stream, now)

    def preempt(self, stream: Stream, now: float) -> None:
        """Take its slot and its KV cache from a running stream; it goes to the head of the waiting."""
        self.running.remove(stream)
        self._free(stream)
        stream.running = False
        stream.computed = 0
        self.waiting.appendleft(stream)
        self._preempted.append(stream)
        self._composer.preempted(stream, now)

    def compose(self, now: float) -> Batch | None:
        """The next step; None if there is nothing to do."""
        step = _Step(self._composer.prepare(self, now))
        if self._compose_running(step, now):
            self._compose_waiting(step)
        if not step.pieces:
            return None
        batch = self._batch(step)
        self._preempted.clear()
        self._composer.composed(batch, now)
        return batch

    def complete(self, batch: Batch, now: float) -> list[Done]:
        """Do a composed step. Streams that are gone are passed over."""
        self._composer.completed(now)
        done = []
        for piece in batch.pieces:
            stream = piece.stream
            if stream.gone:
                continue
            reached = min(piece.upto, stream.input_tokens)
            prefilled = max(0, reached - stream.reached)
            stream.reached += prefilled
            stream.made += piece.makes
            finished = piece.makes and stream.made == stream.output_tokens
            if finished:
                self.remove(stream.key, now)
            done.append(Done(stream.key, prefilled, int(piece.makes), finished))
        return done

    # --- inside ------------------------------------------------------------------------------------

    def _compose_running(self, step: _Step, now: float) -> bool:
        """Whether the KV cache was enough for all."""
        place, enough = 0, True
        while place < len(self.running) and step.budget > 0:
            stream = self.running[place]
            place += 1
            if stream.held or stream.composed >= stream.max_tokens:
                continue
            tokens = min(stream.left, step.budget)
            while not self._allocate(stream, tokens):
                enough = False
                victim = self.running[-1]
                step.undo(victim)
                self.preempt(victim, now)
                if victim is stream:
                    return False
            step.take(stream, tokens)
        return enough

    def _compose_waiting(self, step: _Step) -> None:
        place = 0
        while place < len(self.waiting) and step.budget > 0 and len(self.running) < self.rules.slots:
            stream = self.waiting[place]
            if not stream.ready:
                place += 1
                continue
            stream.computed = stream.cached_tokens
            tokens = min(stream.left, step.budget)
            if not self._allocate(stream, tokens):
                stream.computed = 0
                return
            del self.waiting[place]
            stream.running = True
            self.running.append(stream)
            step.take(stream, tokens)

    def _batch(self, step: _Step) -> Batch:
        prefill = decodes = kv = 0
        for piece in step.pieces.values():
            kv += piece.upto
            if piece.tokens == 1 and piece.makes:
                decodes += 1
            else:
                prefill += piece.tokens
        seconds = self._step_time.seconds(prefill, decodes, kv) * self.slowdown
        preempted = tuple(stream.key for stream in self._preempted)
        return Batch(seconds, tuple(step.pieces.values()), prefill, decodes, kv, preempted)

    def _allocate(self, stream: Stream, tokens: int) -> bool:
        more = _blocks(stream.computed + tokens - stream.cached_tokens) - stream.blocks
        if more > self.free_blocks:
            return False
        stream.blocks += more
        self.blocks_in_use += more
        return True

    def _free(self, stream: Stream) -> None:
        self.blocks_in_use -= stream.blocks
        stream.blocks = 0


class _Step:
    """A step while it is composed."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.pieces: dict[int, Piece] = {}

    def take(self, stream: Stream, tokens: int) -> None:
        makes = tokens == stream.left
        stream.computed += tokens
        stream.composed += makes
        self.budget -= tokens
        self.pieces[stream.key] = Piece(stream, tokens, makes)

    def undo(self, stream: Stream) -> None:
        """Leave out again what was taken."""
        piece = self.pieces.pop(stream.key, None)
        if piece is not None:
            self.budget += piece.tokens
            stream.composed -= piece.makes


def _blocks(tokens: int) -> int:
    return -(-tokens // KV_BLOCK)
