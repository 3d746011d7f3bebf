"""What a node tells Prometheus is what its scheduler and its step scheduler know."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry

from contract.step_time import StepTime
from scheduler import Ask, Capacity
from serving.metrics import NodeCollector
from serving.node import Node, StepOutput, Verdict
from serving.seat_rows import SeatRows
from serving.step_table import StepTable
from tests.unit.test_node import Caller, Clocks, pledge, settle, snapshot

G = 5.0


@pytest.fixture
def table() -> StepTable:
    table, path = StepTable.create(StepTime(1e-3, 1e-6, 1e-6, 1e-9), 1.0)
    path.unlink()
    return table


async def test_a_stream_that_gets_less_than_its_guarantee_shows_in_every_figure(table: StepTable) -> None:
    clocks = Clocks(now=100.0)
    rows = SeatRows(table)
    node = Node(Capacity(4, 100_000), clock=lambda: clocks.now, wall_clock=lambda: clocks.wall, rows=rows)
    node.apply(snapshot(pledge()))
    caller = Caller(node, Verdict(pledge()), Ask(input_tokens=10, max_tokens=500))
    await settle()
    assert caller.ticket_id is not None
    # One token at once, then 4 a second where 5 are owed, and in one second only 2.
    node.record_step([StepOutput(caller.ticket_id, 1, 0)], [])
    for second in range(20):
        clocks.advance(0.5)
        node.record_step([StepOutput(caller.ticket_id, 2 if second == 12 else 4, 0)], [])
        clocks.advance(0.5)
    table.add_held(rows.row("a"), 2.5)
    table.write(held=3, preempted=7, allowed_s=0.02, model_error=0.04)
    for seconds in (30e-6, 70e-6, 5e-3):
        table.count_own_time([seconds])

    registry = CollectorRegistry()
    registry.register(NodeCollector(node))

    def told(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"boosts_{name}", labels)

    assert told("owed_tokens_total") == pytest.approx(20 * G)
    assert told("delivered_tokens_total") == 1 + 20 * 4 - 2
    # The first, and of the second what was not due yet.
    assert told("borrowed_tokens_total") == pytest.approx(1 + 4 - G / 2)
    assert told("shortfall_tokens_total") == 0
    # The last second has not settled yet; of the others only the first, with the first token, got all 5.
    assert (told("owed_seconds_total"), told("missed_seconds_total")) == (19, 18)
    assert told("attainment_lowest", window="1") == pytest.approx(2 / G)
    assert told("attainment_lowest", window="10") == pytest.approx(38 / (10 * G))
    assert told("attainment_lowest", window="60") == pytest.approx((1 + 19 * 4 - 2) / (19 * G), rel=0.02)
    assert told("held_seconds_total") == 2.5
    assert (told("held_sequences"), told("preempted_sequences_total")) == (3, 7)
    assert (told("step_allowed_seconds"), told("step_time_error")) == (0.02, 0.04)
    buckets = {
        bound: told("step_scheduler_seconds_bucket", le=bound) for bound in ("2.5e-05", "0.0001", "+Inf")
    }
    assert buckets == {"2.5e-05": 0, "0.0001": 2, "+Inf": 3}
    assert told("step_scheduler_seconds_sum") == pytest.approx(5.1e-3)
    assert (told("in_flight_sequences"), told("seats_open")) == (1, 1)

    node.record_step([StepOutput(caller.ticket_id, 1, 0)], [caller.ticket_id])
    caller.leave.set()
    await settle()
    assert told("shortfall_tokens_total") == pytest.approx(20 * G - 80)


async def test_a_node_that_owes_nothing_tells_no_attainment() -> None:
    clocks = Clocks()
    node = Node(Capacity(4, 100_000), clock=lambda: clocks.now, wall_clock=lambda: clocks.wall)
    node.apply(snapshot(pledge()))
    registry = CollectorRegistry()
    registry.register(NodeCollector(node))
    assert registry.get_sample_value("boosts_attainment_lowest", {"window": "60"}) is None
    assert registry.get_sample_value("boosts_held_sequences") is None, "it has no step table"
