"""The step policy: which running sequences take part in the engine's next steps.

Theory of operation (docs/scheduling.md derives it):

* Once in the engine every sequence gets one token per step, so a step's length is everybody's pace. The
  `quantity` oldest sequences of a guaranteed seat are *owed*; all others, and all sequences of other seats,
  are *borrowed*, and borrowed work can be revoked between steps: *held*, its KV cache kept.
* While owed sequences decode, a step may take `tokens it brings the seat / rate the seat is owed`, for the
  seat where that is least. Borrowed decodes take part as long as the step-time model stays within it; the
  rest is held. Where everything fits nothing is held, and where nobody is owed a pace there
  is none to keep.
* Seats share what borrowed decodes get by start-time fair queuing (Goyal, Vin, Cheng 1996) on virtual time,
  borrowed tokens over weight; a seat that lacks nothing is lifted to the virtual time of those that do, so
  that idling earns nothing. Within a seat sequences take turns: who has waited longest displaces who has run
  longest, each after `turn_steps` at least. So none starves, more sequences do not raise a seat's share, and
  the batch changes seldom: a change costs the engine more than a decode.
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
from heapq import nsmallest
from typing import Any

from scheduler.step_time import StepTimeFit
from scheduler.streams import StepSeat, Stream

UNLIMITED = 2**31
_PREFILL_GAIN = 1 / 64


@dataclass(frozen=True, slots=True)
class StepRules:
    """Constants of the step policy."""

    margin: float = 0.02
    """The pace aimed at is faster than the owed one by this much, for what no model foresees."""
    review_steps: int = 16
    """Steps after which the batch is chosen anew, if nothing calls for it earlier."""
    turn_steps: int = 32
    """Steps for which a sequence takes part, or is held, before it may change places with another; in tokens
    over weight, what a seat must lag behind another to get a place of it."""
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
        self._least_lead_s = 0.0
        """Of the seat that is furthest behind, in time of its rate; 0 if nobody is."""
        self._virtual = 0.0
        self._step = 0
        """Number of the last composed step."""
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
            seat.classify()
            self._review = True

    def forget_seat(self, seat_id: Hashable) -> None:
        """Drop a seat; it must have no sequences in the engine."""
        seat = self.seats.pop(seat_id)
        assert not seat.streams, "a seat with sequences was forgotten"

    def enter(self, stream_id: Hashable, seat_id: Hashable, input_tokens: int) -> Stream:
        """A sequence has come to the engine, to wait for its first step."""
        seat = self.seats[seat_id]
        stream = Stream(stream_id, seat, input_tokens)
        self.streams[stream_id] = seat.streams[stream_id] = self._prompts[stream_id] = stream
        seat.classify()
        return stream

    def leave(self, stream_id: Hashable, now: float) -> None:
        """The sequence is over."""
        stream = self.streams.pop(stream_id)
        self._set_held(stream, False, now)
        self._changed.pop(stream, None)
        self._prompts.pop(stream_id, None)
        stream.seat.forget(stream)
        self._membership_changed(stream)
        if not self.streams:
            self.borrowed_limit = UNLIMITED

    def preempted(self, stream_id: Hashable, recompute_tokens: int, now: float) -> None:
        """The sequence lost its KV cache and waits; `recompute_tokens` are to be prefilled again."""
        stream = self.streams[stream_id]
        self._set_held(stream, False, now)
        stream.running = False
        stream.preemptions += 1
        stream.computed = 0
        stream.prefill_left = recompute_tokens
        self._prompts[stream_id] = stream
        self._membership_changed(stream)

    def cached(self, stream_id: Hashable, tokens: int) -> None:
        """The prefix cache has `tokens` of what the sequence had to prefill."""
        stream = self.streams[stream_id]
        # Its last token is always computed, or there would be nothing to sample from.
        stream.prefill_left = max(1, stream.prefill_left - tokens)
        stream.computed += tokens

    def _membership_changed(self, stream: Stream) -> None:
        """The stream began or ceased to decode."""
        self._review |= stream.seat.classify() or stream.owed
        self._refill = True

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
        self._step += 1

    def _prefilled(self, stream: Stream, tokens: int) -> None:
        stream.running = True
        stream.prefill_left = max(0, stream.prefill_left - tokens)
        stream.computed += tokens
        if stream.decoding:
            # With its last chunk it makes its first token.
            del self._prompts[stream.stream_id]
            stream.decoded += 1
            stream.turn = stream.fixed_until = self._step
            self._membership_changed(stream)

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

    def rank(self, stream_id: Hashable) -> tuple[bool, bool, float, int]:
        """A sort key by which KV cache is taken from the end: from borrowed prompts, then from the borrowed
        decodes of the seat that is furthest ahead."""
        stream = self.streams[stream_id]
        return (not stream.owed, not stream.decoding, stream.seat.tag, stream.turn)

    def prompts_last(self, stream_id: Hashable) -> tuple[bool, bool]:
        """A sort key by which a step's tokens are given out: to decodes, to owed prompts, to the others."""
        stream = self.streams[stream_id]
        return (not stream.decoding, not stream.owed)

    def prompts_running(self) -> bool:
        """Whether prompts have begun that are not complete."""
        return any(stream.running for stream in self._prompts.values())

    # --- decodes -----------------------------------------------------------------------------------

    def _choose(self, now: float) -> None:
        self._review = self._refill = False
        self._until_review = self.rules.review_steps
        owed = self._account(now)
        if not owed:
            self._free_all(now)
            return
        borrowed = self._borrowed_decodes()
        fitting = self._fitting(owed, borrowed)
        # It grows bit by bit: a step that happened to be short is no reason to try twice the batch.
        self._room = fitting if self._room == UNLIMITED else min(fitting, self._room + 2 + self._room // 4)
        for place, stream in enumerate(borrowed):
            self._set_held(stream, place >= self._room, now)
        for seat in owed:
            for stream in seat.owed:
                self._set_held(stream, False, now)
        self._limit_borrowed(self._room + max(1, int(self._room * self.rules.spare_share)), now)

    def _account(self, now: float) -> dict[StepSeat, float]:
        """Bring tags and leads up to `now`; the rate that each seat with an owed pace should get."""
        rules, contended = self.rules, self.held > 0
        needed: dict[StepSeat, float] = {}
        self._least_lead_s = 0.0
        for seat in self.seats.values():
            owed, borrowed = seat.settle()
            if contended:
                seat.tag += borrowed / seat.weight
            rate = seat.owed_rate()
            if rate <= 0.0:
                seat.counted_at = None
                continue
            if seat.counted_at is None:
                seat.lead = 0.0
            else:
                lead = seat.lead + owed + borrowed - rate * (now - seat.counted_at)
                seat.lead = max(-rate * rules.kept_lag_s, min(rate * rules.kept_lead_s, lead))
            seat.counted_at = now
            self._least_lead_s = min(self._least_lead_s, seat.lead / rate)
            needed[seat] = max(0.5 * rate, rate * (1.0 + rules.margin) - seat.lead / rules.horizon_s)
        return needed

    def _fitting(self, needed: dict[StepSeat, float], borrowed: list[Stream]) -> int:
        """How many borrowed decodes may take part; where all do, how many like them could. Puts them in the
        order in which they do, unless all fit."""
        model = self.fit.model
        decodes = kv_tokens = 0
        for seat in needed:
            seat.visible = 0
            for stream in seat.owed:
                if stream.decoding:
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
        self._put_in_order(borrowed)
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
        return int(min(UNLIMITED, max(0.0, room_s) / max(1e-9, each_s)))

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
            for stream in nsmallest(self._room - taking_part, held, key=_longest_held):
                self._set_held(stream, False, now)
        elif taking_part > self._room:
            free = [stream for stream in borrowed if not stream.held]
            for stream in nsmallest(taking_part - self._room, free, key=self._first_to_go):
                self._set_held(stream, True, now)

    def _borrowed_decodes(self) -> list[Stream]:
        return [stream for stream in self.streams.values() if not (stream.prefill_left or stream.owed)]

    def _put_in_order(self, borrowed: list[Stream]) -> None:
        """Lowest virtual time first, as it will be when all that come before have had a turn."""
        by_seat: dict[StepSeat, list[Stream]] = {}
        lacking: set[StepSeat] = set()
        for stream in borrowed:
            by_seat.setdefault(stream.seat, []).append(stream)
            if stream.held:
                lacking.add(stream.seat)
        if lacking:
            self._virtual = max(self._virtual, min(seat.tag for seat in lacking))
        keys: dict[Stream, float] = {}
        for seat, streams in by_seat.items():
            if seat not in lacking:
                seat.tag = max(seat.tag, self._virtual)
            streams.sort(key=self._turn)
            for place, stream in enumerate(streams):
                keys[stream] = seat.tag + place * self.rules.turn_steps / seat.weight
        borrowed.sort(key=keys.__getitem__)

    def _turn(self, stream: Stream) -> tuple[int, int]:
        """The order in a seat: who is in a turn, who has waited for one, who had one."""
        if self._step < stream.fixed_until:
            return (3, stream.turn) if stream.held else (0, stream.turn)
        return (1, stream.turn) if stream.held else (2, -stream.turn)

    def _first_to_go(self, stream: Stream) -> tuple[bool, float, int]:
        """Whose turn is over, of the seat that is furthest ahead, and has run longest."""
        return (self._step < stream.fixed_until, -stream.seat.tag, stream.turn)

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
        self.borrowed_limit = min(UNLIMITED, max(1, useful))
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
        # A lag that owed prompts may cause, borrowed ones may not.
        most_behind_s = self.rules.kept_lead_s if owed else 0.0
        stretched = self._least_lead_s >= -most_behind_s
        allowed = self.allowed_s * (self.rules.stretch if stretched else 1.0)
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
            stream.turn = self._step
            stream.fixed_until = self._step + self.rules.turn_steps
            self._changed.setdefault(stream, stream.held)
            stream.held = held
            self.held += 1 if held else -1


def _longest_held(stream: Stream) -> tuple[float, int]:
    return (stream.seat.tag, stream.turn)
