"""What seats are owed and what they got, integrated over the trace."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.simulator import trace
from benchmarks.simulator.oracles.oracle import Oracle
from benchmarks.simulator.oracles.view import EPSILON, PromptView, View


class LedgerTruth(Oracle):
    """The ledger's totals are those of an integration over the trace, token by token and span by span."""

    name = "ledger"
    sees = (
        trace.SeatOpened,
        trace.SeatClosed,
        trace.Ended,
    )

    def __init__(self) -> None:
        self._blocks: dict[str, list[tuple[float, float]]] = {}
        self._opened: dict[str, float] = {}

    def see(self, event: trace.Event, view: View) -> Iterator[str]:
        match event:
            case trace.SeatOpened():
                self._opened[event.seat_id] = event.at
            case trace.SeatClosed():
                block = (self._opened.pop(event.seat_id), event.at)
                self._blocks.setdefault(event.seat_id, []).append(block)
            case trace.Ended():
                for seat_id, opened in self._opened.items():
                    self._blocks.setdefault(seat_id, []).append((opened, event.at))
                for totals in event.seats:
                    yield from self._compare(totals, view, event.at)

    def _compare(self, totals: trace.SeatTotals, view: View, end: float) -> Iterator[str]:
        prompts = [p for p in view.prompts.values() if p.prompt.seat_id == totals.seat_id]
        delivered = sum(prompt.produced for prompt in prompts)
        if delivered != totals.delivered_tokens:
            yield f"{totals.seat_id} shows {totals.delivered_tokens} delivered, the engine made {delivered}"
        terms = view.seats[totals.seat_id].terms
        marks: list[tuple[float, int]] = []
        for prompt in prompts:
            if prompt.outcomes == ["rejected"]:
                continue
            start = owing_since(prompt)
            stop = end if prompt.ended_at is None else prompt.ended_at
            for opened, closed in self._blocks[totals.seat_id]:
                if max(start, opened) < min(stop, closed):
                    marks.append((max(start, opened), prompt.prompt.count))
                    marks.append((min(stop, closed), -prompt.prompt.count))
        owed = integrate(marks, terms.quantity) * terms.guarantee_tok_s
        if abs(owed - totals.owed_tokens) > EPSILON * max(1.0, owed):
            yield f"{totals.seat_id} shows {totals.owed_tokens} owed, it was {owed}"


def owing_since(prompt: PromptView) -> float:
    """When a prompt began to be owed its rate: at its first token, or when that was due."""
    return prompt.due if prompt.first_token_at is None else min(prompt.due, prompt.first_token_at)


def integrate(marks: list[tuple[float, int]], most: int) -> float:
    """Seconds times requests, at most `most` of them at a time; a mark is a time and a change."""
    total, owing, since = 0.0, 0, 0.0
    for at, change in sorted(marks):
        total += min(owing, most) * (at - since)
        owing, since = owing + change, at
    return total
