"""How many borrowed decodes steps have room for beside what is owed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from heapq import heapify, heapreplace

from contract.step_time import StepTime
from scheduler.prompts import Prompts
from scheduler.step_rules import UNLIMITED
from scheduler.streams import Decodes, StepSeat, Stream


def room_for_borrowed(
    needed: dict[StepSeat, float],
    decodes: Decodes,
    prompts: Prompts,
    model: StepTime,
    in_order: Callable[[], Iterator[Stream]],
) -> tuple[float, int, list[Stream] | None]:
    """How many borrowed decodes may take part without making steps too long for a seat.

    Returns the longest step that keeps everybody's pace, in seconds; how many borrowed decodes may take part,
    where all may how many like them could; and those that may in their order, None where all may.

    `needed`: tokens per second, by seat with owed decodes; at least one. `in_order`: all borrowed decodes, of
    which one more is asked for than fit.
    """
    owed = kv_tokens = 0
    for seat in needed:
        seat.visible = 0
        for stream in seat.owed:
            if stream.decoding:
                seat.visible += 1
                kv_tokens += stream.computed
        owed += seat.visible
    tightest = _Tightest(needed)
    allowed_s = tightest.allowed_s
    prompts_s = prompts.time_kept(allowed_s - model.seconds(0, owed, kv_tokens), model)
    all_kv_tokens = decodes.kv_tokens + decodes.resting_kv_tokens
    room_s = allowed_s - prompts_s - model.seconds(0, decodes.count, all_kv_tokens)
    if room_s >= 0.0:
        more = _more(model, decodes.count, all_kv_tokens, room_s)
        return allowed_s, decodes.count - owed + more, None
    fitting: list[Stream] = []
    for stream in in_order():
        allowed_s = tightest.allowed_s
        # The seat's own further sequences bring it tokens too, so each may be slower.
        tightest.count_in(stream.seat)
        with_it = kv_tokens + stream.computed
        if model.seconds(0, owed + len(fitting) + 1, with_it) + prompts_s > tightest.allowed_s:
            return allowed_s, len(fitting), fitting
        fitting.append(stream)
        kv_tokens = with_it
    allowed_s = tightest.allowed_s
    room_s = allowed_s - prompts_s - model.seconds(0, owed + len(fitting), kv_tokens)
    return allowed_s, len(fitting) + _more(model, owed + len(fitting), kv_tokens, room_s), fitting


def _more(model: StepTime, decodes: int, kv_tokens: int, room_s: float) -> int:
    """How many further decodes like these `room_s` has room for."""
    kv_each = kv_tokens / max(1, decodes)
    each_s = model.seconds(0, decodes + 1, kv_tokens + kv_each) - model.seconds(0, decodes, kv_tokens)
    return int(min(UNLIMITED, max(0.0, room_s) / max(1e-9, each_s)))


class _Tightest:
    """The longest step that brings every seat the tokens that it needs: tokens a step brings, by rate."""

    def __init__(self, needed: dict[StepSeat, float]) -> None:
        self._needed = needed
        self._seats = [
            (seat.visible / rate, place, seat) for place, (seat, rate) in enumerate(needed.items())
        ]
        heapify(self._seats)

    @property
    def allowed_s(self) -> float:
        return self._seats[0][0]

    def count_in(self, seat: StepSeat) -> None:
        """One more of the seat's sequences takes part."""
        seat.visible += 1
        while True:
            before_s, place, tightest = self._seats[0]
            now_s = tightest.visible / self._needed[tightest]
            if now_s <= before_s:
                return
            heapreplace(self._seats, (now_s, place, tightest))
