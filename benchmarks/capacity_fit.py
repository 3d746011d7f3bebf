"""From measured phases to a node's capacity: how long a step takes, and what can be sold of it. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from benchmarks.estimates import Samples
from benchmarks.load import Phase, RequestRecord
from contract.capacity import NodeCapacity, Promise, judge
from contract.step_time import StepTime

PACES_TOK_S = (1, 2, 5, 10, 15, 20, 30, 40, 50, 75, 100, 150, 200, 300, 500, 1000)


@dataclass(frozen=True, slots=True)
class Point:
    """One measured level: what its steps held on average, and how long they took."""

    level: str
    streams: float
    """Decoding, on average over the window."""
    kv_tokens: float
    prefill_tokens: float
    """In each step."""
    step_s: float

    @property
    def stream_tok_s(self) -> float:
        return 1 / self.step_s

    @property
    def total_tok_s(self) -> float:
        return self.streams / self.step_s


def point(level: str, phase: Phase, client: str) -> Point:
    """The level's steps, by what its client was served. Raises ValueError when that is nothing."""
    served = phase.served[client]
    spans = [span for span in (_span(record, phase) for record in phase.records) if span is not None]
    streams = sum(seconds for seconds, _ in spans) / phase.window_s
    if not streams or not served.output_tokens:
        raise ValueError(f"{level}: no stream made tokens within the measuring window")
    # Each step gives each stream one token.
    steps = served.output_tokens / streams
    return Point(
        level=level,
        streams=streams,
        kv_tokens=sum(seconds * context for seconds, context in spans) / phase.window_s,
        prefill_tokens=served.input_tokens / steps,
        step_s=phase.window_s / steps,
    )


def _span(record: RequestRecord, phase: Phase) -> tuple[float, float] | None:
    """For how long it decoded within the window, and its mean context meanwhile."""
    if record.first_token_s is None or record.last_token_s is None:
        return None
    start = max(record.first_token_s, phase.start_s)
    end = min(record.last_token_s, phase.end_s)
    if end <= start:
        return None
    rate = record.decode_tok_s or 0.0
    return end - start, record.input_tokens + 1 + rate * ((start + end) / 2 - record.first_token_s)


def prefill_tok_s(phase: Phase) -> float:
    """Prompt tokens per second, between the first and the last prompt that was done in the window.

    Raises ValueError with fewer than two.
    """
    done = sorted(
        (record.first_token_s, record.input_tokens)
        for record in phase.records
        if record.first_token_s is not None and phase.start_s <= record.first_token_s < phase.end_s
    )
    if len(done) < 2:
        raise ValueError("fewer than two prompts were prefilled within the measuring window: lengthen it")
    return sum(tokens for _, tokens in done[1:]) / (done[-1][0] - done[0][0])


def fit(points: Sequence[Point], prefill_tok_s: float, active_share: float = 0.0) -> tuple[StepTime, float]:
    """The step time with the least squared relative error, and its mean relative error.

    A prompt token costs what it costs when nothing but prompts runs, which counts the fixed part of those
    steps too: the other constants are fitted to what is left. None is negative.
    """
    known = StepTime(0.0, 1 / prefill_tok_s, 0.0, 0.0, active_share=active_share)
    rows = np.array([_row(each, known) for each in points])
    seconds = np.array([max(each.step_s - each.prefill_tokens / prefill_tok_s, 0.0) for each in points])
    weights = 1 / np.array([each.step_s for each in points])
    base_s, decode_s, kv_token_s, experts_s = _non_negative(rows * weights[:, None], seconds * weights)
    fitted = replace(known, base_s=base_s, decode_s=decode_s, kv_token_s=kv_token_s, experts_s=experts_s)
    errors = [abs(_predicted(fitted, each) / each.step_s - 1) for each in points]
    return fitted, float(np.mean(errors))


def _row(each: Point, known: StepTime) -> tuple[float, float, float, float]:
    return 1.0, each.streams, each.kv_tokens, known.touched(each.streams)


def _predicted(fitted: StepTime, each: Point) -> float:
    return fitted.seconds(each.prefill_tokens, each.streams, each.kv_tokens)


def _non_negative(rows: Samples, values: Samples) -> list[float]:
    """The least squares of which no term is below 0: with four terms every choice of them can be tried."""
    # Columns of very different size would cost digits; one of zeros (no experts) is left out.
    sizes = np.linalg.norm(rows, axis=0)
    usable = [place for place in range(rows.shape[1]) if sizes[place] > 0]
    best, least = np.zeros(rows.shape[1]), float(values @ values)
    for count in range(1, len(usable) + 1):
        for chosen in map(list, combinations(usable, count)):
            solved = np.linalg.lstsq(rows[:, chosen] / sizes[chosen], values, rcond=None)[0] / sizes[chosen]
            residual = values - rows[:, chosen] @ solved
            if (solved >= 0).all() and float(residual @ residual) < least:
                best = np.zeros(rows.shape[1])
                best[chosen], least = solved, float(residual @ residual)
    return [float(term) for term in best]


@dataclass(frozen=True, slots=True)
class Offer:
    """What a node can do at one pace."""

    guarantee_tok_s: float
    streams: int
    """The most that decode at this pace, when nothing else runs."""
    total_tok_s: float
    """Of them together: the best total at this pace."""
    seats: int
    """That can be sold with this guarantee: with the prompts that their limits allow, and the margin."""


def offers(capacity: NodeCapacity, promise: Promise) -> list[Offer]:
    """What the node can do at each pace that it can keep for one stream at least."""
    found = (_offer(capacity, replace(promise, guarantee_tok_s=float(pace))) for pace in PACES_TOK_S)
    return [offer for offer in found if offer.streams]


def _offer(capacity: NodeCapacity, promise: Promise) -> Offer:
    bare = replace(promise, prefill_tok_s=0.0, margin=0.0)
    streams = judge(capacity, bare, 0).most_seats or 0
    step_s = capacity.step_time.seconds(0, streams, streams * promise.context_tokens)
    return Offer(
        guarantee_tok_s=promise.guarantee_tok_s,
        streams=streams,
        total_tok_s=streams / step_s if step_s else 0.0,
        seats=judge(capacity, promise, 0).most_seats or 0,
    )
