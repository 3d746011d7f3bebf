"""Oracles: what the node promises, checked on the trace of a simulation from outside.

They share no code with the scheduler: a `View` follows the trace with its own bookkeeping (its own token
buckets, its own expected outputs), and each oracle asks it whether what the scheduler did was right. An
oracle reports a broken promise as a line of text that begins with the oracle's name.

docs/scheduling.md derives the bound that `fairness` holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

from benchmarks.simulator import trace
from benchmarks.simulator.oracles.entry import EntryGuarantee, Room, WorkConservation
from benchmarks.simulator.oracles.fairness import Fairness
from benchmarks.simulator.oracles.ledger import LedgerTruth
from benchmarks.simulator.oracles.oracle import Oracle
from benchmarks.simulator.oracles.outcomes import Blocks, OneOutcome, Order
from benchmarks.simulator.oracles.pace import Pace
from benchmarks.simulator.oracles.refusals import HonestRefusals, QueueTimeout
from benchmarks.simulator.oracles.steps import BorrowedGivesWay, NeedlessHolds, NoStalls, NoStarvation
from benchmarks.simulator.oracles.view import Promised, View

__all__ = ["Oracle", "Pace", "Promised", "View", "all_oracles", "service", "violations"]

MOST_REPORTED = 20


def all_oracles() -> list[Oracle]:
    return [
        EntryGuarantee(),
        Room(),
        WorkConservation(),
        Order(),
        OneOutcome(),
        Blocks(),
        HonestRefusals(),
        QueueTimeout(),
        Fairness(),
        LedgerTruth(),
        Pace(),
        NeedlessHolds(),
        NoStarvation(),
        NoStalls(),
        BorrowedGivesWay(),
    ]


def violations(
    events: Sequence[trace.Event],
    promised: Promised | None = None,
    oracles: Sequence[Oracle] | None = None,
) -> list[str]:
    """The promises that a trace breaks, one line each, in order; at most the first few. New `oracles` may be
    given, for what they know afterwards."""
    view = View(promised or Promised())
    oracles = all_oracles() if oracles is None else oracles
    before = {kind: [o for o in oracles if kind in o.foresees] for kind in get_args(trace.Event)}
    after = {kind: [o for o in oracles if kind in o.sees] for kind in get_args(trace.Event)}
    broken: list[str] = []
    for event in events:
        for oracle in before[type(event)]:
            broken += (f"{oracle.name}: {line}" for line in oracle.foresee(event, view))
        view.follow(event)
        for oracle in after[type(event)]:
            broken += (f"{oracle.name}: {line}" for line in oracle.see(event, view))
        if len(broken) >= MOST_REPORTED:
            break
    return broken


def service(events: Sequence[trace.Event], since_s: float, until_s: float) -> dict[str, float]:
    """Cost that the engine worked for each seat between two times."""
    view = View(Promised())
    before: dict[str, float] = {}
    for event in events:
        if event.at > until_s:
            break
        if event.at <= since_s:
            before = {}
        view.follow(event)
        if event.at <= since_s:
            before = {seat_id: seat.service for seat_id, seat in view.seats.items()}
    return {seat_id: seat.service - before.get(seat_id, 0.0) for seat_id, seat in view.seats.items()}
