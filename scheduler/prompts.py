"""Prompts that wait or are being read: which come first, and what they need of a step.

Owed prompts come first, earliest deadline first. Each is owed `prefill_tok_s`, and what a step has for them
is bounded twice: by its time, which the step policy knows, and by its tokens, of which each decode takes one.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Hashable, Iterator
from typing import Final

from contract.step_time import StepTime
from scheduler.step_rules import UNLIMITED, StepRules
from scheduler.streams import Decodes, Stream

_GAIN: Final = 1 / 64


class Prompts:
    """The sequences that have tokens to prefill, waiting or running. Only the step policy changes it."""

    def __init__(self, rules: StepRules, step_tokens: int, decodes: Decodes) -> None:
        """`step_tokens`: the most that the engine computes in one step, prompts and decodes together."""
        self.streams: dict[Hashable, Stream] = {}
        self._begun: dict[Hashable, Stream] = {}
        """Those of them that run."""
        self._rules = rules
        self._step_tokens = step_tokens
        self._decodes = decodes
        self._tokens = 0.0
        """In a step, mean of late."""
        self._made_way = False
        """Prompts were kept back in the last step for an owed one that waited."""

    def add(self, stream: Stream) -> None:
        """The sequence waits to be read."""
        self.streams[stream.stream_id] = stream

    def begin(self, stream: Stream) -> None:
        """It has taken part in a step."""
        stream.running = True
        self._begun[stream.stream_id] = stream

    def drop(self, stream: Stream) -> None:
        """It is read, or over."""
        del self.streams[stream.stream_id]
        self._begun.pop(stream.stream_id, None)

    def in_order(self) -> list[Hashable]:
        """Those that have begun, in the order in which they should be given what decodes leave of a step's
        tokens: owed ones first, earliest deadline first."""
        running = list(self._begun.values())
        running.sort(key=lambda stream: (not stream.owed, stream.due if stream.owed else 0.0))
        return [stream.stream_id for stream in running]

    def owed_waiting(self) -> list[Stream]:
        """The owed ones that have not begun."""
        if not self._some_are_owed():
            return []
        return [stream for stream in self.streams.values() if stream.owed and not stream.running]

    def owed(self) -> list[Stream]:
        """The owed ones that the engine can work at."""
        if not self._some_are_owed():
            return []
        return [
            stream for stream in self.streams.values() if stream.owed and (stream.running or stream.ready)
        ]

    def _some_are_owed(self) -> bool:
        """Whether any is: seldom so, and many may wait that need not be looked through."""
        return self._decodes.owed < self._decodes.owed_in_all

    def keep_back(self, owed: list[Stream], *, tight: bool) -> Iterator[tuple[Stream, bool]]:
        """Of each that has begun, whether it stands in the way of an owed one; all borrowed ones do if it is
        `tight`.

        An engine serves running prompts before waiting ones. They make way for one step at most, or short
        owed prompts in a row would starve them.
        """
        waiting = [stream.due for stream in owed if not stream.running]
        urgent = min(waiting) if waiting and not self._made_way else None
        self._made_way = urgent is not None
        for stream in self._begun.values():
            in_the_way = urgent is not None and not (stream.owed and stream.due <= urgent)
            yield stream, in_the_way or (tight and not stream.owed)

    def count(self, tokens: int) -> None:
        """A step was composed with so many prompt tokens."""
        self._tokens += _GAIN * (tokens - self._tokens)

    def time_kept(self, room_s: float, model: StepTime) -> float:
        """The part of a step's room that is kept for prompts: one step takes many, and many take none."""
        return max(0.0, min(self._rules.prefill_share * room_s, self._tokens * model.prefill_token_s))

    def exceed_a_step(self, tokens: int, decodes: int) -> bool:
        """Whether a step with so many decodes has too few tokens left for so many of a prompt."""
        return tokens > self._step_tokens - decodes

    def owed_tok_s(self, owed: list[Stream], now: float) -> float:
        """Tokens per second at which the `owed` ones have to be read together."""
        # What is late has to catch up: at its own rate the next one would be late too.
        return sum(
            (self._rules.hurry if stream.due <= now else 1.0) * stream.seat.prefill_tok_s for stream in owed
        )

    def most_decodes(self, decodes: int, kv_tokens: int, model: StepTime, now: float) -> int:
        """With how many of the decodes steps have tokens enough for what is owed to prompts.

        With n of them and s tokens, a step of t(n) seconds computes s - n of the prompts; it has to be
        t(n) times what they are owed per second.
        """
        owed = self.owed()
        if not self.exceed_a_step(sum(stream.prefill_left for stream in owed), decodes):
            return UNLIMITED
        owed_tok_s = (1.0 + self._rules.margin) * self.owed_tok_s(owed, now)
        kv_each = kv_tokens / max(1, decodes)

        def too_slow(n: int) -> bool:
            left = self._step_tokens - n
            return owed_tok_s * model.seconds(left, n, n * kv_each) > left

        return bisect_left(range(1, decodes + 1), True, key=too_slow)
