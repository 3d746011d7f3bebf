"""Prometheus metrics of the node, under the prefix `boosts_`; no key or customer in any label."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import accumulate
from operator import attrgetter
from typing import TYPE_CHECKING

from prometheus_client import Counter, Histogram
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from scheduler import Outcome, SeatReading
from scheduler.ledger import WINDOWS_S
from serving.step_table import OWN_TIME_US, StepTable

if TYPE_CHECKING:
    from serving.node import Node

_WAITS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)

QUEUE_WAIT_SECONDS = Histogram(
    "boosts_queue_wait_seconds", "From arrival at admission to entering the engine", buckets=_WAITS_S
)
FIRST_TOKEN_SECONDS = Histogram(
    "boosts_first_token_seconds", "From arrival at admission to the engine's first token", buckets=_WAITS_S
)
REFUSALS = Counter("boosts_refusals", "Requests answered with a refusal, by reason", ["reason"])
DECISION_SECONDS = Histogram(
    "boosts_decision_seconds",
    "One decision of the admission scheduler",
    buckets=(1e-6, 5e-6, 1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 1e-3, 1e-2),
)

_SUMS: tuple[tuple[str, str, Callable[[SeatReading], float]], ...] = (
    ("boosts_input_tokens", "Input tokens dispatched", attrgetter("input_tokens")),
    ("boosts_cached_tokens", "Of these, prefix cache hits", attrgetter("cached_tokens")),
    ("boosts_delivered_tokens", "Output tokens the engine made", attrgetter("output_tokens")),
    ("boosts_owed_tokens", "Output tokens guaranteed so far", attrgetter("owed_tokens")),
    ("boosts_borrowed_tokens", "Delivered beyond what was owed", attrgetter("borrowed_tokens")),
    (
        "boosts_shortfall_tokens",
        "Owed and not delivered by the end of their busy period",
        attrgetter("shortfall_tokens"),
    ),
    (
        "boosts_owed_seconds",
        "Whole seconds throughout which a seat was owed something",
        attrgetter("owed_seconds"),
    ),
    (
        "boosts_missed_seconds",
        "Of these, seconds in which it got less than 95 % of it",
        attrgetter("missed_seconds"),
    ),
)
"""Counters that are sums over the seats."""


class NodeCollector(Collector):
    """Sums over the seats, read from the scheduler when Prometheus asks, so the token path pays nothing."""

    def __init__(self, node: Node) -> None:
        self._node = node

    def collect(self) -> Iterable[Metric]:
        node = self._node
        readings = node.readings()
        requests = CounterMetricFamily(
            "boosts_requests", "Requests that left admission, by outcome", labels=["outcome"]
        )
        for outcome in Outcome:
            count = sum(reading.requests[outcome.value] for reading in readings)
            requests.add_metric([outcome.value], count)
        yield requests
        for name, about, count_of in _SUMS:
            yield CounterMetricFamily(name, about, value=sum(map(count_of, readings)))
        yield GaugeMetricFamily(
            "boosts_queued_requests", "Waiting in admission", value=node.admission.queued()
        )
        yield GaugeMetricFamily("boosts_in_flight_sequences", "In the engine", value=node.admission.in_flight)
        lowest = GaugeMetricFamily(
            "boosts_attainment_lowest",
            "Delivered over owed of the seat with the least, by window in s (1: the worst of the last 12)",
            labels=["window"],
        )
        for window in WINDOWS_S:
            attained = [share for r in readings if (share := r.attainment[window]) is not None]
            if attained:
                lowest.add_metric([str(window)], min(attained))
        yield lowest
        yield GaugeMetricFamily("boosts_seats_open", "Pledges inside a block", value=node.open_seats())
        yield GaugeMetricFamily(
            "boosts_entitlements_revision", "Revision of the snapshot in use", value=node.revision()
        )
        if node.rows is not None:
            yield CounterMetricFamily(
                "boosts_held_seconds",
                "Sequence-seconds held between steps, of the seats there are",
                value=sum(node.held_s(reading.seat_id) for reading in readings),
            )
            yield from _step_metrics(node.rows.table)


def _step_metrics(table: StepTable) -> Iterable[Metric]:
    """What the step scheduler says of itself."""
    readings = table.read()
    yield GaugeMetricFamily("boosts_held_sequences", "Held between steps", value=readings.held)
    yield CounterMetricFamily(
        "boosts_preempted_sequences", "Lost their slot or KV cache in the engine", value=readings.preempted
    )
    yield GaugeMetricFamily(
        "boosts_step_allowed_seconds",
        "Longest step that keeps everybody's pace; 0 while nobody is owed one",
        value=readings.allowed_s,
    )
    yield GaugeMetricFamily(
        "boosts_step_time_error", "Mean relative error of predicted step times", value=readings.model_error
    )
    counts = list(accumulate(table.own_time_counts()))
    bounds = [*(str(bound / 1e6) for bound in OWN_TIME_US), "+Inf"]
    yield HistogramMetricFamily(
        "boosts_step_scheduler_seconds",
        "The step scheduler's own CPU time per step, in EngineCore",
        buckets=list(zip(bounds, counts, strict=True)),
        sum_value=readings.own_s,
    )
