"""The step policy: which running sequences take part in the engine's next steps.

Theory of operation (docs/scheduling.md derives it):

* Once in the engine every sequence gets one token per step, so a step's length is everybody's pace. The
  `quantity` oldest sequences of a guaranteed seat are *owed*; all others, and all sequences of other seats,
  are *borrowed*, and borrowed work can be revoked between steps: *held*, its KV cache kept.
* While owed sequences decode, a step may take `tokens it brings the seat / rate the seat is owed`, for the
  seat where that is least. Borrowed decodes take part, lowest tag first, as long as the step-time model stays
  within it; the rest is held. Where everything fits nothing is held, and where nobody is owed a pace there
  is none to keep.
* The tag of a borrowed sequence is its virtual time by start-time fair queuing (Goyal, Vin, Cheng 1996): its
  decoded tokens over its share, which is the seat's weight over the seat's sequences. A sequence that takes
  part makes room only for one that is `stickiness` tokens behind it. So held sequences rotate, none
  starves, and the batch changes seldom: a change costs the engine more than a decode.
* Each seat's lead or lag against what it is owed is fed back into the rate that it needs, so that an error of
  the model shows as a somewhat smaller batch and not as a broken promise.
* Prompts: what is left of the allowed time is the most that may be prefilled in the step. Borrowed prompts
  are kept back where an owed one needs their place.

Nothing here reads a clock or knows vLLM; times are seconds of one monotonic clock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from heapq import nlargest, nsmallest
from typing import Any

from scheduler.step_time import StepTimeFit

UNLIMITED = 2**31
_PREFILL_GAIN = 1 / 64


@dataclass(frozen=True, slots=True)
class StepRules:
    """Constants of the step policy."""

    margin: float = 0.02
    """The pace aimed at is faster than the owed one by this much, for what no model foresees."""
    review_steps: int = 16
    """Steps after which the batch is chosen anew, if nothing calls for it earlier."""
    stickiness: int = 32
    """Decoded tokens by which a sequence must be ahead of a held one to make room for it."""
    horizon_s: float = 0.25
    """Time in which a lag is made up for, or a lead is given away."""
    kept_lead_s: float = 0.03
    """A lead counts for at most this much time of the seat's rate."""
    kept_lag_s: float = 0.25
    """A lag counts for at most this much; more was not the batch's fault."""
    prefill_share: float = 0.5
    """Borrowed decodes leave room for as many prompt tokens as steps had of late, but at most this share of
    what the owed ones leave."""
    stretch: float = 2.0
    """Prompts may lengthen a step to this many times the pace, while nobody is behind."""
    spare_share: float = 0.125
    """Borrowed sequences of use in the engine beyond those that take part, so that no step goes short
    between an end and the next entry."""
    ramp_s: float = 0.15
    """Time in which `borrowed_limit` may double: a pause between two owed requests must not let in a crowd
    that would only be held."""


class StepSeat:
    """What the step policy knows of one seat. Only `StepPolicy` writes it.

    Invariant: `streams` are those of its sequences that are in the engine, oldest first.
    """

    __slots__ = (
        "counted_at",
        "decoded",
        "guarantee_tok_s",
        "held_s",
        "lead",
        "prefill_tok_s",
        "quantity",
        "streams",
        "visible",
        "weight",
    )

    def __init__(self) -> None:
        self.guarantee_tok_s = 0.0
        self.prefill_tok_s = 1.0
        self.quantity = 1
        self.weight = 1.0
        self.streams: dict[Hashable, Stream] = {}
        self.held_s = 0.0
        """Sequence-seconds held so far."""
        self.decoded = 0
        """Tokens that are not in its lead yet, of streams that are gone."""
        self.counted_at: float | None = None
        """Up to when its lead is known; None while it is owed no pace."""
        self.lead = 0.0
        """Tokens ahead of what is owed; negative when behind."""
        self.visible = 0
        """Its decodes in the batch that is being chosen."""

    def owed_rate(self) -> float:
        """Tokens per second owed to the sequences that decode."""
        if self.guarantee_tok_s <= 0.0:
            return 0.0
        decoding = 0
        for stream in self.streams.values():
            if stream.prefill_left == 0:
                decoding += 1
                if decoding == self.quantity:
                    break
        return self.guarantee_tok_s * decoding


class Stream:
    """One sequence in the engine. Only `StepPolicy` writes it.

    Invariants: a held stream takes part in no step; an owed one is never held.
    """

    __slots__ = (
        "computed",
        "decoded",
        "held",
        "held_since",
        "owed",
        "preemptions",
        "prefill_left",
        "running",
        "seat",
        "stream_id",
        "tag",
    )

    def __init__(self, stream_id: Hashable, seat: StepSeat, input_tokens: int, tag: float) -> None:
        self.stream_id = stream_id
        self.seat = seat
        self.prefill_left = input_tokens
        """Tokens to compute before it decodes; 0 once it does."""
        self.computed = 0
        """Tokens in the KV cache."""
        self.running = False
        """It has taken part in a step, and was not preempted since."""
        self.owed = False
        self.held = False
        self.held_since = 0.0
        self.preemptions = 0
        self.tag = tag
        self.decoded = 0
        """Tokens that neither its tag nor its seat's lead counts yet."""

    @property
    def decoding(self) -> bool:
        return self.prefill_left == 0

    @property
    def share(self) -> float:
        return self.seat.weight / len(self.seat.streams)


@dataclass(frozen=True, slots=True)
class Plan:
    """What the engine's adapter has to change before the next step."""

    changed: tuple[Stream, ...]
    """Streams whose `held` has changed since the last plan."""
    prefill_tokens: int | None
    """Prompt tokens that the step may take beside its decodes; None for as many as the engine can."""


@dataclass(frozen=True, slots=True)
class Composed:
    """What is in a step that is on its way through the engine."""

    at: float
    prefill_tokens: int
    decodes: int
    kv_tokens: int


class StepPolicy:
    """Chooses what takes part in each step.

    Per step the engine's adapter calls `plan`, `composed` and, when the step is done, `completed`; several
    steps may be under way. `enter`, `leave` and `preempted` come in between.

    Invariants: no owed stream is held; no decode is held while nobody is owed a pace.
    """

    def __init__(self, fit: StepTimeFit, rules: StepRules | None = None) -> None:
        self.fit = fit
        self.rules = rules or StepRules()
        self.streams: dict[Hashable, Stream] = {}
        self.seats: dict[Hashable, StepSeat] = {}
        self.allowed_s: float | None = None
        """Longest step that keeps everybody's pace; None while nobody is owed one."""
        self.borrowed_limit = UNLIMITED
        """Borrowed sequences that are of use in the engine at present; more would only be held."""
        self.held = 0
        self._prompts: dict[Hashable, Stream] = {}
        """Streams with tokens to prefill, waiting or running."""
        self._room = UNLIMITED
        """Borrowed decodes that may take part."""
        self._decodes = 0
        self._kv_tokens = 0
        """Of the last step."""
        self._prefill = 0.0
        """Prompt tokens in a step, mean of late."""
        self._behind = False
        self._virtual = 0.0
        self._steps: deque[Composed] = deque()
        self._last_end = 0.0
        self._until_review = 0
        self._review = False
        self._refill = False
        self._changed: dict[Stream, bool] = {}
        """With what the adapter last knew of their `held`."""
        self._limited_at = 0.0
        self._kept_back = False

    # --- who is there -----------------------------------------------------------------------------

    def set_seat(
        self,
        seat_id: Hashable,
        guarantee_tok_s: float,
        prefill_tok_s: float,
        quantity: int,
        weight: float,
    ) -> None:
        """What the seat is guaranteed from now on (0 outside its blocks), and its share of the rest."""
        seat = self.seats.get(seat_id)
        if seat is None:
            seat = self.seats[seat_id] = StepSeat()
        before = seat.guarantee_tok_s, seat.quantity
        seat.guarantee_tok_s, seat.prefill_tok_s = guarantee_tok_s, prefill_tok_s
        seat.quantity, seat.weight = quantity, weight
        if before != (guarantee_tok_s, quantity):
            self._classify(seat)
            self._review = True

    def forget_seat(self, seat_id: Hashable) -> None:
        """Drop a seat; it must have no sequences in the engine."""
        seat = self.seats.pop(seat_id)
        assert not seat.streams, "a seat with sequences was forgotten"

    def enter(self, stream_id: Hashable, seat_id: Hashable, input_tokens: int) -> Stream:
        """A sequence has come to the engine, to wait for its first step."""
        seat = self.seats[seat_id]
        stream = Stream(stream_id, seat, input_tokens, self._virtual)
        self.streams[stream_id] = seat.streams[stream_id] = self._prompts[stream_id] = stream
        self._classify(seat)
        return stream

    def leave(self, stream_id: Hashable, now: float) -> None:
        """The sequence is over."""
        stream = self.streams.pop(stream_id)
        self._set_held(stream, False, now)
        self._changed.pop(stream, None)
        self._prompts.pop(stream_id, None)
        del stream.seat.streams[stream_id]
        stream.seat.decoded += stream.decoded
        self._classify(stream.seat)
        self._gone(stream)
        if not self.streams:
            self.borrowed_limit = UNLIMITED

    def preempted(self, stream_id: Hashable, recompute_tokens: int, now: float) -> None:
        """The sequence lost its KV cache and waits; `recompute_tokens` are to be prefilled again."""
        stream = self.streams[stream_id]
        self._set_held(stream, False, now)
        self._gone(stream)
        stream.running = False
        stream.preemptions += 1
        stream.computed = 0
        stream.prefill_left = recompute_tokens
        self._prompts[stream_id] = stream

    def cached(self, stream_id: Hashable, tokens: int) -> None:
        """The prefix cache has `tokens` of what the sequence had to prefill."""
        stream = self.streams[stream_id]
        # Its last token is always computed, or there would be nothing to sample from.
        stream.prefill_left = max(1, stream.prefill_left - tokens)
        stream.computed += tokens

    def _classify(self, seat: StepSeat) -> None:
        """The seat's oldest sequences, as many as it has seats, are owed."""
        owed = seat.quantity if seat.guarantee_tok_s > 0 else 0
        for place, stream in enumerate(seat.streams.values()):
            if stream.owed != (place < owed):
                stream.owed = place < owed
                self._review = True
            elif place > owed:
                # The others are borrowed as before.
                break

    def _gone(self, stream: Stream) -> None:
        if stream.decoding:
            self._review |= stream.owed
            self._refill |= not stream.owed

    # --- each step ---------------------------------------------------------------------------------

    def plan(self, now: float) -> Plan:
        """Choose what may take part in the next step."""
        if self._review or self._until_review <= 0:
            self._choose(now)
        elif self._refill:
            self._bring_to_room(now)
        prefill_tokens = self._plan_prompts(now) if self._prompts else None
        changed = tuple(stream for stream, held in self._changed.items() if stream.held != held)
        self._changed.clear()
        return Plan(changed, prefill_tokens)

    def composed(self, scheduled: Mapping[Any, int], now: float) -> None:
        """The step that was made of the plan: tokens to compute, by stream."""
        prefill = decodes = kv_tokens = 0
        streams = self.streams
        for stream_id, tokens in scheduled.items():
            stream = streams[stream_id]
            if stream.prefill_left:
                prefill += tokens
                self._prefilled(stream, tokens)
            else:
                decodes += 1
                stream.computed += 1
                stream.decoded += 1
            kv_tokens += stream.computed
        self._decodes, self._kv_tokens = decodes, kv_tokens
        self._prefill += _PREFILL_GAIN * (prefill - self._prefill)
        self._steps.append(Composed(now, prefill, decodes, kv_tokens))
        self._until_review -= 1

    def _prefilled(self, stream: Stream, tokens: int) -> None:
        stream.running = True
        stream.prefill_left = max(0, stream.prefill_left - tokens)
        stream.computed += tokens
        if stream.decoding:
            # With its last chunk it makes its first token.
            del self._prompts[stream.stream_id]
            stream.decoded += 1
            self._review |= stream.owed
            self._refill |= not stream.owed

    def completed(self, now: float) -> None:
        """The oldest composed step is done."""
        step = self._steps.popleft()
        began = max(self._last_end, step.at)
        self._last_end = now
        self.fit.observe(step.prefill_tokens, step.decodes, step.kv_tokens, now - began)

    # --- victims -----------------------------------------------------------------------------------

    def victim(self, among: Iterable[Hashable]) -> Hashable | None:
        """The borrowed sequence whose slot an owed one takes; None if all are owed. The one that was
        preempted least, and of these the one that is cheapest to compute again."""
        borrowed = [stream for each in among if not (stream := self.streams[each]).owed]
        if not borrowed:
            return None
        return min(borrowed, key=lambda stream: (stream.preemptions, stream.computed)).stream_id

    def rank(self, stream_id: Hashable) -> tuple[bool, float]:
        """A sort key by which KV cache is taken from the end: from borrowed work that is furthest ahead."""
        stream = self.streams[stream_id]
        return (not stream.owed, _tag(stream))

    # --- decodes -----------------------------------------------------------------------------------

    def _choose(self, now: float) -> None:
        self._review = self._refill = False
        self._until_review = self.rules.review_steps
        owed = self._account(now)
        borrowed = self._borrowed_decodes()
        if borrowed:
            self._virtual = max(self._virtual, min(stream.tag for stream in borrowed))
        if not owed:
            self._free_all(now)
            return
        fitting = self._fitting(owed, borrowed)
        # It grows bit by bit: a step that happened to be short is no reason to try twice the batch.
        self._room = fitting if self._room == UNLIMITED else min(fitting, self._room + 2 + self._room // 4)
        for place, stream in enumerate(borrowed):
            self._set_held(stream, place >= self._room, now)
        for seat in owed:
            for stream in seat.streams.values():
                if not stream.owed:
                    break
                self._set_held(stream, False, now)
        self._limit_borrowed(self._room + max(1, int(self._room * self.rules.spare_share)), now)

    def _account(self, now: float) -> dict[StepSeat, float]:
        """Bring tags and leads up to `now`; the rate that each seat with an owed pace should get."""
        rules = self.rules
        needed: dict[StepSeat, float] = {}
        self._behind = False
        for seat in self.seats.values():
            decoded = self._settle(seat)
            rate = seat.owed_rate()
            if rate <= 0.0:
                seat.counted_at = None
                continue
            if seat.counted_at is None:
                seat.lead = 0.0
            else:
                lead = seat.lead + decoded - rate * (now - seat.counted_at)
                seat.lead = max(-rate * rules.kept_lag_s, min(rate * rules.kept_lead_s, lead))
            seat.counted_at = now
            self._behind |= seat.lead < -rate * rules.kept_lead_s
            needed[seat] = max(0.5 * rate, rate * (1.0 + rules.margin) - seat.lead / rules.horizon_s)
        return needed

    def _fitting(self, needed: dict[StepSeat, float], borrowed: list[Stream]) -> int:
        """How many borrowed decodes may take part; where all do, how many like them could. Puts them in the
        order in which they do, unless all fit."""
        model = self.fit.model
        decodes = kv_tokens = 0
        for seat in needed:
            seat.visible = 0
            for stream in seat.streams.values():
                if stream.owed and stream.decoding:
                    seat.visible += 1
                    kv_tokens += stream.computed
            decodes += seat.visible
        tightest = min(needed, key=lambda seat: seat.visible / needed[seat])
        allowed = tightest.visible / needed[tightest]
        prompts = self._prompt_time(allowed - model.seconds(0, decodes, kv_tokens))
        all_decodes = decodes + len(borrowed)
        all_kv_tokens = kv_tokens + sum(stream.computed for stream in borrowed)
        self.allowed_s = allowed
        if model.seconds(0, all_decodes, all_kv_tokens) + prompts <= allowed:
            room_s = allowed - prompts - model.seconds(0, all_decodes, all_kv_tokens)
            return len(borrowed) + self._more(all_decodes, all_kv_tokens, room_s)
        self._sort(borrowed)
        for place, stream in enumerate(borrowed):
            if stream.seat in needed:
                # The seat's own further sequences bring it tokens too, so each may be slower.
                stream.seat.visible += 1
                if stream.seat is tightest:
                    tightest = min(needed, key=lambda seat: seat.visible / needed[seat])
                    self.allowed_s = tightest.visible / needed[tightest]
            decodes, kv_tokens = decodes + 1, kv_tokens + stream.computed
            if model.seconds(0, decodes, kv_tokens) + prompts > self.allowed_s:
                return place
        if len(needed) == 1 and all(stream.seat in needed for stream in borrowed):
            # Whoever is alone may be as many as it likes: they all bring it tokens.
            return UNLIMITED
        room_s = self.allowed_s - prompts - model.seconds(0, decodes, kv_tokens)
        return len(borrowed) + self._more(decodes, kv_tokens, room_s)

    def _more(self, decodes: int, kv_tokens: int, room_s: float) -> int:
        """How many further decodes like these `room_s` has room for."""
        model, kv_each = self.fit.model, kv_tokens / max(1, decodes)
        each_s = model.seconds(0, decodes + 1, kv_tokens + kv_each) - model.seconds(0, decodes, kv_tokens)
        return int(min(UNLIMITED, room_s / max(1e-9, each_s)))

    def _prompt_time(self, room_s: float) -> float:
        """The part of a step's room that is kept for prompts: one step takes many, and many take none."""
        return max(
            0.0, min(self.rules.prefill_share * room_s, self._prefill * self.fit.model.prefill_token_s)
        )

    def _bring_to_room(self, now: float) -> None:
        """Between reviews: a borrowed decode came or went."""
        self._refill = False
        if self.allowed_s is None:
            return
        borrowed = self._borrowed_decodes()
        held = [stream for stream in borrowed if stream.held]
        taking_part = len(borrowed) - len(held)
        if taking_part < self._room:
            for stream in nsmallest(self._room - taking_part, held, key=_tag):
                self._set_held(stream, False, now)
        elif taking_part > self._room:
            free = [stream for stream in borrowed if not stream.held]
            for stream in nlargest(taking_part - self._room, free, key=_tag):
                self._set_held(stream, True, now)

    def _borrowed_decodes(self) -> list[Stream]:
        return [stream for stream in self.streams.values() if not (stream.prefill_left or stream.owed)]

    def _settle(self, seat: StepSeat) -> int:
        """Let the tags of a seat's streams have what was decoded, and return it. Owed work counts as none: a
        stream that was owed competes from the present virtual time."""
        decoded, seat.decoded = seat.decoded, 0
        if not seat.streams:
            return decoded
        tokens = len(seat.streams) / seat.weight
        for stream in seat.streams.values():
            decoded += stream.decoded
            stream.tag = self._virtual if stream.owed else stream.tag + stream.decoded * tokens
            stream.decoded = 0
        return decoded

    def _sort(self, borrowed: list[Stream]) -> None:
        """By tag, but who takes part already stays for a while."""
        stay = self.rules.stickiness
        borrowed.sort(key=lambda each: each.tag if each.held else each.tag - stay / each.share)

    def _free_all(self, now: float) -> None:
        self.allowed_s = None
        self._room = UNLIMITED
        if self.held:
            for stream in self.streams.values():
                self._set_held(stream, False, now)
        self._limit_borrowed(UNLIMITED, now)

    def _limit_borrowed(self, useful: int, now: float) -> None:
        """Let in no more than are of use; more at once only bit by bit."""
        if self.borrowed_limit < UNLIMITED:
            doublings = min(20.0, (now - self._limited_at) / self.rules.ramp_s)
            useful = min(useful, int(self.borrowed_limit * 2.0**doublings) + 1)
            self._until_review = min(self._until_review, 4)
        self.borrowed_limit = min(UNLIMITED, useful)
        self._limited_at = now

    # --- prompts -----------------------------------------------------------------------------------

    def _plan_prompts(self, now: float) -> int | None:
        """Keep borrowed prompts back where owed ones need their place; the most prompt tokens."""
        owed = [stream for stream in self._prompts.values() if stream.owed]
        tight = self.allowed_s is not None
        # An engine serves running prompts before waiting ones. Where there is time for both, borrowed ones
        # are kept back for one step at most, or a stream of short owed prompts would starve them.
        waits = any(not stream.running for stream in owed)
        keep_back = (bool(owed) and tight) or (waits and not self._kept_back)
        if keep_back or self._kept_back:
            for stream in self._prompts.values():
                self._set_held(stream, keep_back and stream.running and not stream.owed, now)
        self._kept_back = keep_back
        return self._prefill_tokens(owed)

    def _prefill_tokens(self, owed: list[Stream]) -> int | None:
        if self.allowed_s is None:
            return None
        model = self.fit.model
        allowed = self.allowed_s if self._behind else self.allowed_s * self.rules.stretch
        # What brings owed first tokens in time has precedence over the others' pace.
        least = self.allowed_s * sum(stream.seat.prefill_tok_s for stream in owed)
        room_s = allowed - model.seconds(0, self._decodes, self._kv_tokens)
        return int(max(least, room_s / max(1e-9, model.prefill_token_s), 0.0))

    # --- holding -----------------------------------------------------------------------------------

    def _set_held(self, stream: Stream, held: bool, now: float) -> None:
        if stream.held:
            stream.seat.held_s += now - stream.held_since
        stream.held_since = now
        if stream.held != held:
            self._changed.setdefault(stream, stream.held)
            stream.held = held
            self.held += 1 if held else -1


def _tag(stream: Stream) -> float:
    return stream.tag + stream.decoded / stream.share
