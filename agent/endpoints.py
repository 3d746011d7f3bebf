"""The agent's own port, on loopback: liveness, readiness of the node, Prometheus metrics."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from aiohttp import web
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.registry import Collector

from contract.nodes import GpuFigures, ServingState


@dataclass(frozen=True, slots=True)
class Standing:
    """The node at one moment."""

    serving: ServingState
    wanted: bool
    """Whether the orders want serving to run."""
    model_id: str | None
    problem: str | None
    restarts: int
    revision: int
    spooled_reports: int
    sent_reports: int
    refused_reports: int
    contact_age_s: float
    clock_offset_s: float | None
    gpus: tuple[GpuFigures, ...]


class Endpoints:
    """Answers `/healthz`, `/readyz` and `/metrics`."""

    def __init__(self, standing: Callable[[], Standing]) -> None:
        self._standing = standing
        self._registry = CollectorRegistry()
        self._registry.register(_AgentCollector(standing))
        application = web.Application()
        application.add_routes(
            [
                web.get("/healthz", self._healthz),
                web.get("/readyz", self._readyz),
                web.get("/metrics", self._metrics),
            ]
        )
        self._runner = web.AppRunner(application, access_log=None)

    async def start(self, listener: socket.socket) -> None:
        """Answer on a socket that listens already."""
        await self._runner.setup()
        await web.SockSite(self._runner, listener).start()

    async def stop(self) -> None:
        await self._runner.cleanup()

    async def _healthz(self, request: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def _readyz(self, request: web.Request) -> web.Response:
        standing = self._standing()
        ready = standing.wanted and standing.serving is ServingState.READY
        answer = {
            "ready": ready,
            "serving": standing.serving.value,
            "wanted": standing.wanted,
            "problem": standing.problem,
        }
        return web.json_response(answer, status=200 if ready else 503)

    async def _metrics(self, request: web.Request) -> web.Response:
        body = generate_latest(self._registry)
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_PLAIN_0_0_4})


class _AgentCollector(Collector):
    """Reads the node's standing when Prometheus asks; no key or customer in any label."""

    def __init__(self, standing: Callable[[], Standing]) -> None:
        self._standing = standing

    def collect(self) -> Iterable[Metric]:
        standing = self._standing()
        up = standing.serving in (ServingState.STARTING, ServingState.READY, ServingState.DRAINING)
        yield _gauge("serving_up", "Whether a serving process is wanted and runs, or drains", up)
        yield _gauge("serving_ready", "Whether it takes requests", standing.serving is ServingState.READY)
        yield _gauge("orders_revision", "Revision of the orders in force, 0 for none", standing.revision)
        yield _gauge(
            "spooled_reports", "Reports the control plane does not have yet", standing.spooled_reports
        )
        yield _gauge(
            "control_plane_contact_age_seconds",
            "Since a call to the control plane last succeeded",
            standing.contact_age_s,
        )
        if standing.clock_offset_s is not None:
            yield _gauge(
                "clock_offset_seconds", "This clock minus the control plane's", standing.clock_offset_s
            )
        yield _counter("serving_restarts", "Starts of serving after an unwanted end", standing.restarts)
        yield _counter("sent_reports", "Reports the control plane has taken", standing.sent_reports)
        yield _counter(
            "refused_reports", "Reports it called invalid, which were set aside", standing.refused_reports
        )
        yield from _gpu_metrics(standing.gpus)


def _gpu_metrics(gpus: tuple[GpuFigures, ...]) -> Iterable[Metric]:
    readings: list[tuple[str, str, Callable[[GpuFigures], float | None]]] = [
        ("gpu_memory_used_bytes", "Memory in use", lambda gpu: gpu.memory_used_bytes),
        ("gpu_memory_total_bytes", "Memory there is", lambda gpu: gpu.memory_total_bytes),
        ("gpu_utilization_ratio", "Part of the time a kernel ran", _utilization_ratio),
        ("gpu_power_watts", "Power drawn", lambda gpu: gpu.power_watts),
        ("gpu_temperature_celsius", "Temperature", lambda gpu: gpu.temperature_celsius),
    ]
    for name, meaning, reading in readings:
        family = GaugeMetricFamily(f"boosts_agent_{name}", meaning, labels=["gpu"])
        for index, gpu in enumerate(gpus):
            value = reading(gpu)
            if value is not None:
                family.add_metric([str(index)], value)
        yield family


def _utilization_ratio(gpu: GpuFigures) -> float | None:
    return None if gpu.utilization_percent is None else gpu.utilization_percent / 100


def _gauge(name: str, meaning: str, value: float) -> Metric:
    return GaugeMetricFamily(f"boosts_agent_{name}", meaning, value=float(value))


def _counter(name: str, meaning: str, value: float) -> Metric:
    return CounterMetricFamily(f"boosts_agent_{name}", meaning, value=value)
