"""What the step policy knows of the seats and of their sequences in the engine."""

from __future__ import annotations

from collections.abc import Hashable


class Stream:
    """One sequence in the engine. Only the step policy writes it.

    Invariants: a held stream takes part in no step; an owed one that decodes is never held.
    """

    __slots__ = (
        "computed",
        "decoded",
        "due",
        "fixed_until",
        "held",
        "held_since",
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
        """When its first token is due, if it is owed."""
        self.ready = True
        """Whether the engine could start it; not while its grammar is compiled, say."""
        self.computed = 0
        """Tokens in the KV cache."""
        self.decoded = 0
        """Tokens that its seat's figures do not count yet."""
        self.running = False
        """It has taken part in a step, and was not preempted since."""
        self.preemptions = 0
        self.owed = False
        self.held = False
        self.held_since = 0.0
        self.turn = 0
        """The step at which it was held or released last."""
        self.fixed_until = 0
        """The step from which on it may be so again."""

    @property
    def decoding(self) -> bool:
        return self.prefill_left == 0


class StepSeat:
    """One seat in the engine. Only the step policy writes it.

    Invariants: `streams` are those of its sequences that are in the engine, oldest first; `owed` are the
    first of these, as many as the seat has seats, those that decode before those that do not yet.
    """

    __slots__ = (
        "borrowed_decoded",
        "counted_at",
        "guarantee_tok_s",
        "held",
        "held_s",
        "lead",
        "owed",
        "owed_decoded",
        "prefill_tok_s",
        "quantity",
        "rate",
        "streams",
        "tag",
        "visible",
        "weight",
    )

    def __init__(self, tag: float) -> None:
        self.guarantee_tok_s = 0.0
        self.prefill_tok_s = 1.0
        self.quantity = 1
        self.weight = 1.0
        self.streams: dict[Hashable, Stream] = {}
        self.owed: list[Stream] = []
        self.tag = tag
        """Virtual time: borrowed tokens while others were held, by weight."""
        self.held = 0
        """Its decodes that are held."""
        self.rate = 0.0
        """What it was owed when its lead was counted last, tokens per second."""
        self.lead = 0.0
        """Tokens ahead of what is owed; negative when behind."""
        self.counted_at: float | None = None
        """Up to when its lead is known; None while it is owed no pace."""
        self.held_s = 0.0
        """Sequence-seconds held so far."""
        self.owed_decoded = 0
        self.borrowed_decoded = 0
        """Tokens of streams that are gone, not counted yet."""
        self.visible = 0
        """Its decodes in the batch that is being chosen."""

    def classify(self) -> bool:
        """Say anew which streams are owed; whether that has changed."""
        most = self.quantity if self.guarantee_tok_s > 0 else 0
        owed: list[Stream] = []
        # A prompt that is still to be computed, or whose grammar is, must not stand for one that decodes.
        for decoding in (True, False):
            for stream in self.streams.values():
                if len(owed) == most:
                    break
                if stream.decoding is decoding:
                    owed.append(stream)
        if owed == self.owed:
            return False
        for stream in self.owed:
            stream.owed = False
        for stream in owed:
            stream.owed = True
        self.owed = owed
        return True

    def owed_rate(self) -> float:
        """Tokens per second owed to the sequences that decode."""
        return self.guarantee_tok_s * sum(stream.decoding for stream in self.owed)

    def settle(self) -> tuple[int, int]:
        """Take what was decoded since the last call: owed and borrowed tokens."""
        owed, borrowed = self.owed_decoded, self.borrowed_decoded
        for stream in self.streams.values():
            if stream.owed:
                owed += stream.decoded
            else:
                borrowed += stream.decoded
            stream.decoded = 0
        self.owed_decoded = self.borrowed_decoded = 0
        return owed, borrowed

    def forget(self, stream: Stream) -> None:
        """The stream is over; what it decoded is kept."""
        del self.streams[stream.stream_id]
        if stream.owed:
            self.owed_decoded += stream.decoded
        else:
            self.borrowed_decoded += stream.decoded
