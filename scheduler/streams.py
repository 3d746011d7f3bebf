"""What the step policy knows of the seats and of their sequences in the engine."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any


class Stream:
    """One sequence in the engine. Only the step policy writes it.

    Invariants: a held stream takes part in no step; an owed one that decodes is never held.
    """

    __slots__ = (
        "due",
        "fixed_until",
        "held",
        "joined",
        "known",
        "owed",
        "preemptions",
        "prefill_left",
        "ready",
        "running",
        "seat",
        "stream_id",
        "turn",
    )

    def __init__(self, stream_id: Hashable, seat: StepSeat, input_tokens: int, due: float) -> None:
        self.stream_id = stream_id
        self.seat = seat
        self.prefill_left = input_tokens
        """Tokens to compute before it decodes; 0 once it does."""
        self.due = due
        """When its first token is due."""
        self.ready = True
        """Whether the engine could start it; not while its grammar is compiled, say."""
        self.known = 0
        """Tokens in the KV cache, but for those of the steps since it joined."""
        self.joined: int | None = None
        """The step since which it has decoded in each; None if it did not in the last, or was held since."""
        self.running = False
        """It has taken part in a step, and was not preempted since."""
        self.preemptions = 0
        self.owed = False
        self.held = False
        self.turn = 0
        """The step at which it was held or released last."""
        self.fixed_until = 0
        """The step from which on it may be so again."""

    @property
    def decoding(self) -> bool:
        return self.prefill_left == 0

    @property
    def stage(self) -> int:
        """2 while it decodes, 1 while it is read, 0 while it waits."""
        return 2 if self.decoding else int(self.running)

    @property
    def computed(self) -> int:
        """Tokens in the KV cache."""
        return self.known if self.joined is None else self.known + self.seat.decodes.step - self.joined


class Decodes:
    """All sequences that decode, and how far they are. Only the step policy changes it.

    Whoever takes part in a step makes one token and grows by one, and from step to step few come or go. So
    only those are looked at, and sums follow by difference: what a step costs hardly grows with the batch.

    Invariants: `count` sequences decode, `owed` of them are owed, as are `owed_in_all` with those that do not
    decode yet; `kv_tokens` are those of the ones in the batch, and `resting_kv_tokens` those of the others;
    whoever decodes is in the batch, held or outside.
    """

    def __init__(self) -> None:
        self.step = 0
        """Steps so far."""
        self.count = 0
        self.owed = 0
        self.owed_in_all = 0
        self.kv_tokens = 0
        self.resting_kv_tokens = 0
        self._batch: dict[Hashable, Stream] = {}
        """Those that were in the last step and were not held since."""
        self._outside: dict[Hashable, Stream] = {}
        """Those that were not in it, and that nothing keeps out of the next."""

    @property
    def in_step(self) -> int:
        """How many were in the last step, and were not held since."""
        return len(self._batch)

    def coming(self) -> tuple[int, int]:
        """How many the next step has if the engine passes none over, and their tokens in the KV cache."""
        outside = self._outside.values()
        return len(self._batch) + len(outside), self.kv_tokens + sum(stream.known for stream in outside)

    def begin(self, stream: Stream) -> None:
        """The sequence's prompt is computed."""
        self.count += 1
        self.owed += stream.owed
        stream.seat.decoding += 1
        if not stream.owed:
            stream.seat.put_last(stream)
        self.resting_kv_tokens += stream.known
        self._outside[stream.stream_id] = stream

    def hold(self, stream: Stream) -> None:
        """The sequence takes part in no step from now on."""
        if stream.joined is None:
            self._outside.pop(stream.stream_id, None)
        else:
            self._rest(stream)

    def release(self, stream: Stream) -> None:
        """A held sequence may take part again."""
        self._outside[stream.stream_id] = stream

    def end(self, stream: Stream) -> None:
        """The sequence is over, or lost its KV cache."""
        self.hold(stream)
        self.count -= 1
        self.owed -= stream.owed
        stream.seat.decoding -= 1
        stream.seat.take_out(stream)
        self.resting_kv_tokens -= stream.known

    def advance(
        self, scheduled: Mapping[Any, int], prompts: Mapping[Hashable, Stream]
    ) -> list[tuple[Stream, int]]:
        """One more step, of these sequences; returns the `prompts` among them, with their tokens."""
        begun = [(prompt, scheduled[key]) for key, prompt in prompts.items() if key in scheduled]
        for stream in [each for key, each in self._outside.items() if key in scheduled]:
            self._join(stream)
        if len(self._batch) + len(begun) > len(scheduled):
            # The engine passed some over: their last token is under way, or it lacks tokens or KV cache.
            for key in self._batch.keys() - scheduled.keys():
                stream = self._outside[key] = self._batch[key]
                self._rest(stream)
        assert len(self._batch) + len(begun) == len(scheduled), "a held or unknown sequence was in a step"
        self.kv_tokens += len(self._batch)
        self.step += 1
        return begun

    def _join(self, stream: Stream) -> None:
        del self._outside[stream.stream_id]
        stream.seat.count_in(stream, 1)
        stream.joined = self.step
        self._batch[stream.stream_id] = stream
        self.resting_kv_tokens -= stream.known
        self.kv_tokens += stream.known

    def _rest(self, stream: Stream) -> None:
        stream.seat.count_in(stream, -1)
        stream.known, stream.joined = stream.computed, None
        del self._batch[stream.stream_id]
        self.kv_tokens -= stream.known
        self.resting_kv_tokens += stream.known


class StepSeat:
    """One seat in the engine. Only the step policy writes it.

    Invariants: `streams` are those of its sequences that are in the engine, oldest first; `owed` are the
    first of these, as many as the seat has seats, those that decode before those that are read, and these
    before those that wait.
    """

    __slots__ = (
        "borrowed_decoded",
        "borrowed_held",
        "borrowed_in_step",
        "borrowed_running",
        "counted_at",
        "counted_step",
        "decodes",
        "decoding",
        "guarantee_tok_s",
        "held",
        "held_at",
        "held_s",
        "kept_out",
        "lead",
        "overdue",
        "owed",
        "owed_decoded",
        "owed_in_step",
        "prefill_tok_s",
        "quantity",
        "rate",
        "streams",
        "tag",
        "visible",
        "weight",
    )

    def __init__(self, tag: float, decodes: Decodes) -> None:
        self.decodes = decodes
        self.guarantee_tok_s = 0.0
        self.prefill_tok_s = 1.0
        self.quantity = 1
        self.weight = 1.0
        self.streams: dict[Hashable, Stream] = {}
        self.owed: list[Stream] = []
        self.overdue = 0
        """Its prompts in the engine whose first token is overdue, at the last review."""
        self.tag = tag
        """Virtual time: borrowed tokens while others were held, by weight."""
        self.decoding = 0
        """Its sequences that decode,"""
        self.held = 0
        """and those of them that are held."""
        self.borrowed_running: dict[Stream, None] = {}
        """Its borrowed decodes that take part,"""
        self.borrowed_held: dict[Stream, None] = {}
        """and those that are held; in both, who has been there longest comes first."""
        self.rate = 0.0
        """What it was owed when its lead was counted last, tokens per second."""
        self.lead = 0.0
        """Tokens ahead of what is owed; negative when behind."""
        self.counted_at: float | None = None
        """Up to when its lead is known; None while it is owed no pace."""
        self.kept_out = 0
        """Its sequences that are held, whether they decode or not."""
        self.held_s = 0.0
        """Sequence-seconds held,"""
        self.held_at = 0.0
        """up to then."""
        self.owed_decoded = 0
        self.borrowed_decoded = 0
        """Tokens up to `counted_step` that were not settled yet."""
        self.owed_in_step = 0
        self.borrowed_in_step = 0
        """Its sequences in each step since `counted_step`."""
        self.counted_step = decodes.step
        self.visible = 0
        """Its decodes in the batch that is being chosen; kept for seats that are owed a pace."""

    @property
    def most_owed(self) -> int:
        """So many of its streams may be owed."""
        return self.quantity if self.guarantee_tok_s > 0 else 0

    def classify(self) -> bool:
        """Say anew which streams are owed; whether that has changed."""
        most = self.most_owed
        owed: list[Stream] = []
        # A prompt that is still to be computed, or whose grammar is, must not stand for one that decodes, nor
        # one that waits, perhaps for more KV cache than there is, for one that runs.
        for stage in (2, 1, 0):
            for stream in self.streams.values():
                if len(owed) == most:
                    break
                if stream.stage == stage:
                    owed.append(stream)
        if owed == self.owed:
            return False
        for stream in self.owed:
            if stream not in owed:
                self._set_owed(stream, False)
        for stream in owed:
            if not stream.owed:
                self._set_owed(stream, True)
        self.owed = owed
        return True

    def _set_owed(self, stream: Stream, owed: bool) -> None:
        change = owed - stream.owed
        self.decodes.owed_in_all += change
        self.decodes.owed += stream.decoding * change
        if stream.joined is None:
            stream.owed = owed
        else:
            self.count_in(stream, -1)
            stream.owed = owed
            self.count_in(stream, 1)
        if owed:
            self.take_out(stream)
        elif stream.decoding:
            # As if it began, or was held, just now: who comes earlier in the order changed earlier.
            stream.turn = stream.fixed_until = self.decodes.step
            self.put_last(stream)

    def put_last(self, stream: Stream) -> None:
        """It is a borrowed decode from now on, or was held or released."""
        self.take_out(stream)
        (self.borrowed_held if stream.held else self.borrowed_running)[stream] = None

    def take_out(self, stream: Stream) -> None:
        """It is no borrowed decode any more."""
        self.borrowed_running.pop(stream, None)
        self.borrowed_held.pop(stream, None)

    def paced(self) -> int:
        """How many of its owed sequences decode."""
        return sum(stream.decoding for stream in self.owed)

    def owing(self) -> int:
        """For how many sequences it is owed its rate: those past their first token, or past its deadline."""
        return min(self.most_owed, self.paced() + self.overdue)

    def count_held(self, change: int, now: float) -> None:
        """From now on so many more of its sequences are held."""
        self.held_s += self.kept_out * (now - self.held_at)
        self.held_at = now
        self.kept_out += change

    def settle(self) -> tuple[int, int]:
        """Take what was decoded since the last call: owed and borrowed tokens."""
        self._count()
        owed, borrowed = self.owed_decoded, self.borrowed_decoded
        self.owed_decoded = self.borrowed_decoded = 0
        return owed, borrowed

    def count(self, stream: Stream, tokens: int) -> None:
        """The sequence made so many tokens more than one in each step that it decodes in: its first does not
        come of one, and the last are made in vain."""
        if stream.owed:
            self.owed_decoded += tokens
        else:
            self.borrowed_decoded += tokens

    def count_in(self, stream: Stream, change: int) -> None:
        """From the next step on, the sequence takes part (+1) or does not (-1)."""
        self._count()
        if stream.owed:
            self.owed_in_step += change
        else:
            self.borrowed_in_step += change

    def _count(self) -> None:
        steps = self.decodes.step - self.counted_step
        self.owed_decoded += steps * self.owed_in_step
        self.borrowed_decoded += steps * self.borrowed_in_step
        self.counted_step = self.decodes.step
