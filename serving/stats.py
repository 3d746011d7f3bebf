"""The operator's port, on loopback: liveness, readiness, Prometheus metrics, throughput per seat."""

from __future__ import annotations

import datetime
import secrets
import socket
from collections.abc import Callable

from aiohttp import web
from prometheus_client import generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from contract.capacity import NodeCapacity
from contract.reports import SeatThroughput, ThroughputReport
from scheduler import SeatReading
from serving.node import Node


class StatsServer:
    """Answers `/healthz`, `/readyz`, `/metrics` and `/stats`; starts when the engine is up."""

    def __init__(
        self,
        node: Node,
        *,
        engine_alive: Callable[[], bool],
        listening: Callable[[], bool],
        measured: Callable[[], NodeCapacity | None] = lambda: None,
    ) -> None:
        self._node = node
        self._engine_alive = engine_alive
        self._listening = listening
        self._measured = measured
        self._boot_id = secrets.token_hex(8)
        self._sequence = 0
        self._runner: web.AppRunner | None = None

    async def start(self, listener: socket.socket) -> None:
        """Answer on a socket that listens already."""
        app = web.Application()
        app.add_routes(
            [
                web.get("/healthz", self._healthz),
                web.get("/readyz", self._readyz),
                web.get("/metrics", self._metrics),
                web.get("/stats", self._stats),
            ]
        )
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        await web.SockSite(self._runner, listener).start()

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()

    async def _healthz(self, request: web.Request) -> web.Response:
        return _verdict(self._engine_alive(), "engine dead")

    async def _readyz(self, request: web.Request) -> web.Response:
        if not self._engine_alive():
            return _verdict(False, "engine dead")
        if self._node.admission.draining:
            return _verdict(False, "draining")
        return _verdict(self._listening(), "starting")

    async def _metrics(self, request: web.Request) -> web.Response:
        return web.Response(body=generate_latest(), headers={"Content-Type": CONTENT_TYPE_PLAIN_0_0_4})

    async def _stats(self, request: web.Request) -> web.Response:
        self._sequence += 1
        report = ThroughputReport(
            version=1,
            boot_id=self._boot_id,
            sequence=self._sequence,
            at=datetime.datetime.now(datetime.UTC),
            entitlements_revision=self._node.revision(),
            capacity=self._measured(),
            seats=tuple(
                _throughput(reading, self._node.held_s(reading.seat_id)) for reading in self._node.readings()
            ),
        )
        return web.Response(text=report.model_dump_json(), content_type="application/json")


def _verdict(good: bool, otherwise: str) -> web.Response:
    return web.Response(status=200 if good else 503, text="ok\n" if good else f"{otherwise}\n")


def _throughput(reading: SeatReading, held_s: float) -> SeatThroughput:
    return SeatThroughput(
        pledge_id=reading.seat_id,
        **reading.requests,
        input_tokens=reading.input_tokens,
        cached_tokens=reading.cached_tokens,
        output_tokens=reading.output_tokens,
        owed_tokens=reading.owed_tokens,
        borrowed_tokens=reading.borrowed_tokens,
        held_s=held_s,
        shortfall_tokens=reading.shortfall_tokens,
        owed_seconds=reading.owed_seconds,
        missed_seconds=reading.missed_seconds,
        attainment_1s=reading.attainment[1],
        attainment_10s=reading.attainment[10],
        attainment_60s=reading.attainment[60],
        queued=reading.queued,
        in_flight=reading.in_flight,
    )
