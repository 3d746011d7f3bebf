"""The step policy: which running sequences take part in the engine's next steps.

Theory of operation (docs/scheduling.md derives it):

* Once in the engine every sequence gets one token per step, so a step's length is everybody's pace. The
  `quantity` oldest sequences of a guaranteed seat are *owed*, those that decode before those that are read
  and these before those that wait; all others, and all sequences of other seats, are *borrowed*, and borrowed
  work can be revoked between steps: *held*, its KV cache kept.
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
* Prompts (`scheduler.prompts`): what is left of the allowed time is the most that may be prefilled in the
  step. Owed prompts come first, earliest deadline first; others are kept back where they would stand in the
  way, and borrowed decodes are held where they leave owed prompts too few of a step's tokens.

Nothing here reads a clock or knows vLLM; times are seconds of one monotonic clock. What is made in each step
is of a plain class: of those mypyc (setup.py) makes fast code, and not of dataclasses and named tuples.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

from scheduler.borrowed_limit import BorrowedLimit
from scheduler.paces import Paces
from scheduler.prompts import Prompts
from scheduler.room import room_for_borrowed
from scheduler.step_rules import UNLIMITED, StepRules
from scheduler.step_time import StepTimeFit
from scheduler.streams import Decodes, StepSeat, Stream
from scheduler.turns import in_order, longest_held


class Plan:
    """What the engine's adapter has to change before the next step."""

    __slots__ = ("changed", "prefill_tokens")

    def __init__(self, changed: list[Stream], prefill_tokens: int | None) -> None:
        self.changed = changed
        """Streams whose `held` has changed since the last plan."""
        self.prefill_tokens = prefill_tokens
        """Prompt tokens that the step may take beside its decodes; None for as many as the engine can."""


class Composed:
    """What is in a step that is on its way through the engine."""

    __slots__ = (
        "at",
        "decodes",
        "first_tokens",
        "kv_tokens",
        "predicted_s",
        "prefill_tokens",
        "surprise_s",
        "took_s",
    )

    def __init__(
        self,
        at: float,
        prefill_tokens: int,
        first_tokens: int,
        decodes: int,
        kv_tokens: int,
        predicted_s: float,
        surprise_s: float,
    ) -> None:
        self.at = at
        self.prefill_tokens = prefill_tokens
        self.first_tokens = first_tokens
        """Prompts of which it computes the rest."""
        self.decodes = decodes
        self.kv_tokens = kv_tokens
        self.predicted_s = predicted_s
        self.surprise_s = surprise_s
        """If it takes longer, the batch is reviewed."""
        self.took_s = 0.0
        """Once it is done."""


class StepPolicy:
    """Chooses what takes part in each step.

    Per step the engine's adapter calls `plan`, `composed` and, when the step is done, `completed`; several
    steps may be under way. `enter`, `leave` and `preempted` come in between.

    Invariants: no owed decode is held; no decode is held while nobody is owed a pace or a prompt.
    """

    def __init__(
        self, fit: StepTimeFit, rules: StepRules | None = None, *, step_tokens: int = UNLIMITED
    ) -> None:
        """`step_tokens`: the most that the engine computes in one step, prompts and decodes together."""
        self.fit = fit
        self.rules = rules or StepRules()
        self.streams: dict[Hashable, Stream] = {}
        self.seats: dict[Hashable, StepSeat] = {}
        self.allowed_s: float | None = None
        """Longest step that keeps everybody's pace; None while nobody is owed one."""
        self._entry = BorrowedLimit(self.rules.ramp_s)
        self.held = 0
        self._held_decodes = 0
        self.paces = Paces(self.rules)
        self._room = UNLIMITED
        """Borrowed decodes that may take part for the pace's sake,"""
        self._beside_prompts = UNLIMITED
        """and for the sake of the owed prompts that are being read."""
        self._came: dict[Stream, None] = {}
        """Borrowed decodes that began since the last review, and take part."""
        self._decodes = Decodes()
        self.prompts = Prompts(self.rules, step_tokens, self._decodes)
        self._virtual = 0.0
        self._steps: deque[Composed] = deque()
        self._done: list[Composed] = []
        """Steps since the last review, when the fit is told of them."""
        self._last_end = 0.0
        self._until_review = 0
        self._review = False
        self._refill = False
        self._changed: dict[Stream, bool] = {}
        """With what the adapter last knew of their `held`."""
        self._review_at = float("-inf")
        self._easy_s = float("inf")
        """The longest step that keeps everybody's pace, while the batch is easy; infinite otherwise."""
        self._lone: StepSeat | None = None
        """The seat that has the engine for itself."""

    @property
    def borrowed_limit(self) -> int:
        """Borrowed sequences that are of use in the engine at present; more would only be held."""
        return self._entry.most

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
            seat = self.seats[seat_id] = StepSeat(self._virtual, self._decodes)
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

    def enter(
        self, stream_id: Hashable, seat_id: Hashable, input_tokens: int, due: float, now: float
    ) -> Stream:
        """A sequence has come to the engine, to wait for its first step; its first token is `due` then."""
        seat = self.seats[seat_id]
        stream = Stream(stream_id, seat, input_tokens, due)
        self.streams[stream_id] = seat.streams[stream_id] = stream
        self.prompts.add(stream)
        # It is the youngest, so it displaces nobody.
        if len(seat.owed) < seat.most_owed:
            seat.classify()
        self._review |= self._lone not in (None, seat)
        if stream.owed:
            self._review |= self.prompts.exceed_a_step(input_tokens, self._decodes.count)
            self._review_at = min(self._review_at, due)
        return stream

    def leave(self, stream_id: Hashable, now: float) -> None:
        """The sequence is over."""
        stream = self.streams.pop(stream_id)
        if stream.joined is not None:
            # What steps under way still make of it is thrown away.
            stream.seat.count(stream, -min(len(self._steps), self._decodes.step - stream.joined))
        self._set_held(stream, False, now)
        self._changed.pop(stream, None)
        del stream.seat.streams[stream_id]
        self._gave_way(stream)
        if stream.decoding:
            self._decodes.end(stream)
        else:
            self.prompts.drop(stream)
        if not self.streams:
            self._entry.lift()
            self.allowed_s = None

    def preempted(self, stream_id: Hashable, recompute_tokens: int, now: float) -> None:
        """The sequence lost its KV cache and waits, held no more; it prefills `recompute_tokens` again."""
        stream = self.streams[stream_id]
        self._set_held(stream, False, now)
        # The adapter knows: it may begin anew in the step that is being made, and be held in the next.
        self._changed.pop(stream, None)
        if stream.decoding:
            self._decodes.end(stream)
        else:
            self.prompts.drop(stream)
        stream.running = False
        stream.preemptions += 1
        stream.known = 0
        stream.prefill_left = recompute_tokens
        self.prompts.add(stream)
        self._gave_way(stream)

    def cached(self, stream_id: Hashable, tokens: int) -> None:
        """The prefix cache has `tokens` of what the sequence had to prefill."""
        stream = self.streams[stream_id]
        # Its last token is always computed, or there would be nothing to sample from.
        stream.prefill_left = max(1, stream.prefill_left - tokens)
        stream.known += tokens

    def _gave_way(self, stream: Stream) -> None:
        """The stream ceased to run."""
        self._came.pop(stream, None)
        self._refill = True
        if stream.owed:
            stream.seat.classify()
            self._review = True

    # --- each step ---------------------------------------------------------------------------------

    def plan(self, now: float) -> Plan:
        """Choose what may take part in the next step."""
        if self._review or self._until_review <= 0 or now >= self._review_at:
            self._choose(now)
        elif self._refill:
            self._bring_to_room(now)
            self._keep_paces(now)
        prefill_tokens = self._plan_prompts(now) if self.prompts.streams else None
        changed = [stream for stream, held in self._changed.items() if stream.held != held]
        self._changed.clear()
        return Plan(changed, prefill_tokens)

    def composed(self, scheduled: Mapping[Any, int], now: float) -> None:
        """The step that was made of the plan: tokens to compute, by stream."""
        prompts = self._decodes.advance(scheduled, self.prompts.streams)
        decodes, kv_tokens = self._decodes.in_step, self._decodes.kv_tokens
        prefill = first_tokens = 0
        for stream, tokens in prompts:
            self._prefilled(stream, tokens)
            prefill += tokens
            first_tokens += stream.decoding
            kv_tokens += stream.known
        self.prompts.count(prefill)
        seconds = self.fit.model.seconds(prefill, decodes, kv_tokens)
        surprise_s = self._easy_s
        if self.allowed_s is not None:
            # The next review will see it; until then shorter steps make up for one that was stretched.
            self.paces.least_lead_s = min(0.0, self.paces.least_lead_s + self.allowed_s - seconds)
            # Prompts may fill a step up to what is allowed, or beyond.
            surprise_s = max(surprise_s, self.rules.surprise * seconds)
        self._steps.append(Composed(now, prefill, first_tokens, decodes, kv_tokens, seconds, surprise_s))
        self._until_review -= 1

    def _prefilled(self, stream: Stream, tokens: int) -> None:
        if not stream.running:
            self.prompts.begin(stream)
            if not stream.owed:
                self._review |= stream.seat.classify()
        stream.prefill_left = max(0, stream.prefill_left - tokens)
        stream.known += tokens
        if stream.decoding:
            # With its last chunk it makes its first token.
            self.prompts.drop(stream)
            self._decodes.begin(stream)
            stream.turn = stream.fixed_until = self._decodes.step
            self._came[stream] = None
            self._refill = True
            self._review |= stream.seat.classify() or stream.owed
            stream.seat.count(stream, 1)

    def completed(self, now: float) -> int:
        """The oldest composed step is done; how many prompts it ended, whose first tokens it brings."""
        step = self._steps.popleft()
        step.took_s = now - max(self._last_end, step.at)
        self._last_end = now
        self._done.append(step)
        self._review |= step.took_s > step.surprise_s
        return step.first_tokens

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

    # --- decodes -----------------------------------------------------------------------------------

    def _choose(self, now: float) -> None:
        self._review = self._refill = False
        self._until_review = self.rules.review_steps
        for step in self._done:
            self.fit.observe(step.prefill_tokens, step.decodes, step.kv_tokens, step.took_s, step.predicted_s)
        self._done.clear()
        self._account(now)
        needed = self.paces.needed
        self._lone = next((seat for seat in needed if len(seat.streams) == len(self.streams)), None)
        self.allowed_s, self._room, fitting = self._fitting()
        self._beside_prompts = self._room_beside_prompts(now)
        self._hold_beyond(min(self._room, self._beside_prompts), fitting, now)
        # Fewer may take part than would fit.
        self._shorten_steps()
        spare = self._room > self._borrowed_count() + self._decodes.count // 2
        easy_s = self.paces.longest_without_leads_s()
        easy = spare and not self.held and self._coming_s() <= easy_s
        self._easy_s = easy_s if easy else float("inf")
        self._review_at = min(
            self._next_due(now), now + (self.rules.easy_review_s if easy else self.rules.review_s)
        )
        self._limit_borrowed(self._room + max(1, int(self._room * self.rules.spare_share)), now)

    def _hold_beyond(self, room: int, fitting: list[Stream] | None, now: float) -> None:
        """Let `room` borrowed decodes take part: the first of the `fitting` ones, or of all."""
        self._came.clear()
        if not self.held and self._borrowed_count() <= room:
            return
        chosen = dict.fromkeys(islice(self._in_order() if fitting is None else fitting, room))
        for stream in chosen:
            if stream.held:
                self._set_held(stream, False, now)
        for seat in self.seats.values():
            # Who has run longest is held last, and so released last.
            beyond = [stream for stream in reversed(seat.borrowed_running) if stream not in chosen]
            for stream in beyond:
                self._set_held(stream, True, now)
            for stream in seat.owed:
                if stream.held:
                    self._set_held(stream, False, now)

    def _room_beside_prompts(self, now: float) -> int:
        decodes = self._decodes
        kv_tokens = decodes.kv_tokens + decodes.resting_kv_tokens
        most = self.prompts.most_decodes(decodes.count, kv_tokens, self.fit.model, now)
        return most if most == UNLIMITED else max(0, most - decodes.owed)

    def _account(self, now: float) -> None:
        """Bring tags and leads up to `now`."""
        contended, lowest = self.held > 0, None
        self._count_overdue(now)
        self.paces.begin()
        for seat in self.seats.values():
            owed, borrowed = seat.settle()
            seat.count_held(0, now)
            if contended:
                seat.tag += borrowed / seat.weight
            if seat.held and (lowest is None or seat.tag < lowest):
                lowest = seat.tag
            self.paces.follow(seat, owed + borrowed, now)
        if lowest is not None:
            self._virtual = max(self._virtual, lowest)

    def _count_overdue(self, now: float) -> None:
        for seat in self.seats.values():
            seat.overdue = 0
        for stream in self.prompts.streams.values():
            stream.seat.overdue += stream.due <= now

    def _fitting(self) -> tuple[float | None, int, list[Stream] | None]:
        """The longest step that keeps everybody's pace; how many borrowed decodes may take part then; and
        these in their order, None where all may."""
        needed = self.paces.needed
        if not needed:
            return None, UNLIMITED, None
        if self._lone is not None:
            # All of its sequences bring it tokens: none is held for its own sake.
            return self._decodes.count / needed[self._lone], UNLIMITED, None
        return room_for_borrowed(needed, self._decodes, self.prompts, self.fit.model, self._in_order)

    def _bring_to_room(self, now: float) -> None:
        """Between reviews: a borrowed decode came or went."""
        self._refill = False
        free = min(self._room, self._beside_prompts) + self._held_decodes - self._borrowed_count()
        if free > 0 and self._held_decodes:
            for stream in longest_held(self.seats.values(), free):
                self._set_held(stream, False, now)
        # Who came beyond the places waits.
        while free < 0 and self._came:
            stream, _ = self._came.popitem()
            self._set_held(stream, True, now)
            free += 1

    def _keep_paces(self, now: float) -> None:
        """Between reviews: a seat that has fewer decodes in the steps than before needs shorter ones, and a
        batch that was easy may be so no more."""
        self._shorten_steps()
        if self.paces.needed and self._easy_s < float("inf"):
            self._easy_s = self.paces.longest_without_leads_s()
            if self._held_decodes or self._coming_s() > self._easy_s:
                self._choose(now)

    def _shorten_steps(self) -> None:
        """Allow no step that is too long for a seat with the decodes that it has in it."""
        if self.allowed_s is not None:
            self.allowed_s = min(self.allowed_s, self.paces.longest_s())

    def _coming_s(self) -> float:
        """How long the next step takes without prompts."""
        decodes, kv_tokens = self._decodes.coming()
        return self.fit.model.seconds(0, decodes, kv_tokens)

    def _next_due(self, now: float) -> float:
        """When the next owed prompt is overdue: from then on its seat is owed its rate."""
        waiting = (stream.due for stream in self.prompts.streams.values() if stream.owed and stream.due > now)
        return min(waiting, default=float("inf"))

    def _borrowed_count(self) -> int:
        return self._decodes.count - self._decodes.owed

    def _in_order(self) -> Iterator[Stream]:
        """The borrowed decodes in the order in which they take part."""
        return in_order(self.seats.values(), self._virtual, self._decodes.step, self.rules.turn_steps)

    def _limit_borrowed(self, useful: int, now: float) -> None:
        if not self._entry.follow(useful, now):
            self._until_review = 1

    # --- prompts -----------------------------------------------------------------------------------

    def _plan_prompts(self, now: float) -> int | None:
        """Keep prompts back where an owed one needs their place; the most prompt tokens of the step."""
        owed = self.prompts.owed()
        for stream, back in self.prompts.keep_back(owed, tight=bool(owed) and self.allowed_s is not None):
            self._set_held(stream, back, now)
        return self._prefill_tokens(owed, now)

    def _prefill_tokens(self, owed: list[Stream], now: float) -> int | None:
        if self.allowed_s is None:
            return None
        rules, model = self.rules, self.fit.model
        token_s = max(1e-9, model.prefill_token_s)
        # A lag that owed prompts may cause, borrowed ones may not.
        stretch_s = 0.0
        if self.paces.least_lead_s >= (-rules.prompt_lag_s if owed else 0.0):
            stretch_s = min(rules.most_stretch_s, (rules.stretch - 1.0) * self.allowed_s)
        room_s = self.allowed_s + stretch_s - self._coming_s()
        # What brings owed first tokens in time has precedence over the others' pace.
        least = self.allowed_s * self.prompts.owed_tok_s(owed, now)
        if self._lone is not None:
            # Its own prompts are what will bring it more.
            least = max(least, self.allowed_s / token_s)
        return int(max(least, room_s / token_s, 0.0))

    # --- holding -----------------------------------------------------------------------------------

    def _set_held(self, stream: Stream, held: bool, now: float) -> None:
        if stream.held == held:
            return
        stream.turn = self._decodes.step
        stream.fixed_until = self._decodes.step + self.rules.turn_steps
        self._changed.setdefault(stream, stream.held)
        stream.held = held
        change = 1 if held else -1
        self.held += change
        stream.seat.count_held(change, now)
        if stream.decoding:
            if not stream.owed:
                stream.seat.put_last(stream)
            if held:
                self._decodes.hold(stream)
                if not stream.seat.held:
                    # From now on it lacks something; what it did while it did not is no lead and no lag.
                    stream.seat.tag = max(stream.seat.tag, self._virtual)
            else:
                self._decodes.release(stream)
            stream.seat.held += change
            self._held_decodes += change
