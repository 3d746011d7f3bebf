"""What is in the steps: nothing held needlessly or for ever, and borrowed work gives way first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from benchmarks.simulator import trace
from benchmarks.simulator.oracles.oracle import Oracle
from benchmarks.simulator.oracles.view import EASY, View

NEEDLESS_STEPS = 40
"""A hold may outlast its reason for this many steps: the batch is reviewed now and then, not in each."""
STALL = 3.0
"""Times the pace that borrowed prompts may take in one step;"""
FIRST_GUESS, FIRST_STEPS = 2.0, 32
"""and so much more in the first steps with prompts: before any was seen they may take twice as long as
thought."""
PASSED_BY_TOKENS = 128
"""Tokens that others may decode while a sequence of the same share is held."""


class NeedlessHolds(Oracle):
    """Nothing is held unless steps with it would be too slow for somebody who is owed his pace."""

    name = "needless hold"
    sees = (trace.Composed,)

    def __init__(self) -> None:
        self._steps = 0

    def see(self, event: trace.Event, view: View) -> Iterator[str]:
        if not isinstance(event, trace.Composed):
            return
        self._steps = self._steps + 1 if event.held and self._easy(view) else 0
        if self._steps == NEEDLESS_STEPS:
            yield f"{len(event.held)} sequences are held for {NEEDLESS_STEPS} steps, and no pace is in danger"

    @staticmethod
    def _easy(view: View) -> bool:
        """Whether no owed prompt waits for its place, and a step of everything would be fast enough."""
        if any(not view.streams[key].decoding for key in view.owed_streams()):
            return False
        pace_s = view.pace_s()
        return pace_s is None or view.full_step_s() < EASY * pace_s


@dataclass(slots=True)
class _Hold:
    passed_by: dict[int, float] = field(default_factory=dict)
    """Tokens that each other borrowed sequence decoded meanwhile; fewer where its share is larger."""


class NoStarvation(Oracle):
    """While a borrowed sequence is held, no other borrowed one decodes much more than its share."""

    name = "starvation"
    sees = (trace.Composed,)

    def __init__(self) -> None:
        self._holds: dict[int, _Hold] = {}

    def see(self, event: trace.Event, view: View) -> Iterator[str]:
        if not isinstance(event, trace.Composed):
            return
        held = {key for key in event.held if view.streams[key].decoding}
        self._holds = {key: self._holds.get(key) or _Hold() for key in held}
        if not held:
            return
        owed = view.owed_streams()
        sequences = Counter(stream.seat_id for stream in view.streams.values())
        share = {seat_id: view.seats[seat_id].terms.quantity / n for seat_id, n in sequences.items()}
        for key, tokens in event.parts:
            stream = view.streams[key]
            if key in owed or tokens != 1 or not stream.decoding:
                continue
            for other, hold in self._holds.items():
                before = hold.passed_by.get(key, 0.0)
                more = min(1.0, share[view.streams[other].seat_id] / share[stream.seat_id])
                passed = hold.passed_by[key] = before + more
                if before < PASSED_BY_TOKENS <= passed:
                    yield f"sequence {other} is held while {key} decoded {passed:.0f} tokens by share"


class NoStalls(Oracle):
    """Borrowed prompts do not make a step several times as long as the pace of those who decode.

    Judged on a machine that is as fast as it was when it began: how fast it is now must be learned.
    """

    name = "stall"
    foresees = (trace.Composed,)

    def __init__(self) -> None:
        self._steps = 0
        """With prompts, while the machine was as fast as when it began."""

    def foresee(self, event: trace.Event, view: View) -> Iterator[str]:
        if not isinstance(event, trace.Composed):
            return
        prompt_tokens = sum(tokens for key, tokens in event.parts if not view.streams[key].decoding)
        if not prompt_tokens or view.slowdown != 1.0:
            return
        self._steps += 1
        pace_s = self._allowed_s(event, view)
        if pace_s is None or not all(view.streams[key].decoding for key in view.owed_streams()):
            return
        assert view.step_time is not None
        seconds = view.step_time.seconds(prompt_tokens, 0, 0)
        most_s = STALL * pace_s * (FIRST_GUESS if self._steps <= FIRST_STEPS else 1.0)
        if seconds > most_s:
            yield f"a step of {seconds * 1e3:.0f} ms of borrowed prompts, the pace is {pace_s * 1e3:.0f} ms"

    @staticmethod
    def _allowed_s(event: trace.Composed, view: View) -> float | None:
        """The step time at which the slowest seat gets what it is owed: its further sequences bring it tokens
        too. None if nobody is owed a pace by others."""
        decodes = {view.streams[key].seat_id: 0 for key, _ in event.parts}
        for key, stream in view.streams.items():
            # Also one that the engine passed over, its last token being under way: the scheduler cannot know.
            if stream.seat_id in decodes and key not in event.held:
                decodes[stream.seat_id] += stream.decoding
        allowed = [
            count / (min(count, view.seats[seat_id].quota) * view.seats[seat_id].terms.guarantee_tok_s)
            for seat_id, count in decodes.items()
            if count and view.seats[seat_id].quota
        ]
        return min(allowed, default=None) if len(decodes) > 1 else None


class BorrowedGivesWay(Oracle):
    """A seat loses a sequence that it is owed only when nothing borrowed was left to take instead."""

    name = "victims"
    sees = (trace.Composed,)

    def see(self, event: trace.Event, view: View) -> Iterator[str]:
        if not isinstance(event, trace.Composed) or not (event.preempted or event.held):
            return
        # Prompts may wait for one that is due earlier, with what they have computed.
        held = {key for key in event.held if view.streams[key].decoding}
        lost = {*event.preempted, *held}
        spare, short = 0, []
        for seat_id, seat in view.seats.items():
            streams = [stream for stream in view.streams.values() if stream.seat_id == seat_id]
            owed = min(seat.quota, sum(stream.decoding or stream.key in lost for stream in streams))
            served = sum(stream.running and stream.key not in held for stream in streams)
            spare += max(0, sum(stream.running for stream in streams) - seat.quota)
            if served < owed and any(stream.key in lost for stream in streams):
                short.append(f"{seat_id} has {served} of {owed}")
        if spare and short:
            yield f"{', '.join(short)} owed sequences, and {spare} borrowed ones keep their place"
