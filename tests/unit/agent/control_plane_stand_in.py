"""A small control plane that keeps to `contract/nodes.py`, and can be away, frozen, contrary or confused."""

from __future__ import annotations

import asyncio
import datetime
import json
from typing import Any, TypeVar

from aiohttp import web

from contract.documents import Document
from contract.errors import ContractError
from contract.keys import KeyKind, new_key
from contract.nodes import (
    Acknowledged,
    Enrolled,
    Enrolment,
    Heartbeat,
    Orders,
    Registered,
    Registration,
    ReportBatch,
    ReportsStored,
)
from contract.reports import ThroughputReport
from tests.contract import documents

Body = TypeVar("Body", bound=Document)


def orders(revision: int = 3, **changes: Any) -> Orders:
    """Orders to serve a model, of one store, from a revision on."""
    entitlements = documents.entitlements(revision=revision) | changes.pop("entitlements", {})
    document = {
        "version": 1,
        "serve": True,
        "model_id": "acme/small",
        "engine_flags": ["--max-num-seqs", "8"],
        "entitlements": entitlements,
    } | changes
    return Orders.model_validate_json(json.dumps(document))


class RefusalError(Exception):
    """Ends a call with an error in the pools API's envelope."""

    def __init__(self, status: int, code: str) -> None:
        self.status = status
        self.code = code


class ControlPlane:
    """One pool with one node, in the test's own event loop."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.join_token = new_key(KeyKind.JOIN)
        self.node_token = new_key(KeyKind.NODE)
        self.joined = 0
        self.epoch = 0
        self.boot_id = ""
        self.orders: Orders | None = None
        self.heartbeats: list[Heartbeat] = []
        self.batches: list[list[ThroughputReport]] = []
        self.reports: dict[tuple[str, int], ThroughputReport] = {}
        self.asked = 0
        """Calls that have reached it."""
        self.clock_ahead_s = 0.0
        self.thawed = asyncio.Event()
        """Cleared: it takes calls and answers none."""
        self.thawed.set()
        self.poisoned: set[int] = set()
        """Sequences of reports that it calls invalid."""
        self.garbage: dict[str, str] = {}
        """Bodies to answer a call with, by the call's name."""
        self.refusals: dict[str, tuple[int, str]] = {}
        self._port = port
        self._changed = asyncio.Event()
        self._runner: web.AppRunner | None = None

    async def start(self) -> None:
        application = web.Application()
        application.router.add_route("*", "/internal/{name}", self._answer)
        self._runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.01)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self._port).start()

    async def stop(self) -> None:
        """Be away; `start` brings it back with all it knew."""
        if self._runner is not None:
            await self._runner.cleanup()

    def order(self, orders: Orders) -> None:
        self.orders = orders
        self._wake_held_calls()

    @property
    def newest(self) -> Heartbeat | None:
        return self.heartbeats[-1] if self.heartbeats else None

    def output_tokens(self) -> int:
        """The last count of every boot, added up: what a customer's bill would say."""
        last: dict[str, int] = {}
        for (boot_id, _), report in sorted(self.reports.items()):
            last[boot_id] = sum(seat.output_tokens for seat in report.seats)
        return sum(last.values())

    async def _answer(self, request: web.Request) -> web.Response:
        self.asked += 1
        name = request.match_info["name"]
        await self.thawed.wait()
        try:
            if name in self.refusals:
                raise RefusalError(*self.refusals[name])
            data = await getattr(self, f"_{name}")(request)
        except RefusalError as refusal:
            error = {"code": refusal.code, "message": f"no: {refusal.code}"}
            return web.json_response({"success": False, "error": error}, status=refusal.status)
        if name in self.garbage:
            return web.Response(text=self.garbage[name], content_type="application/json")
        if data is None:
            return web.Response(status=204)
        return web.json_response(text=f'{{"success": true, "data": {data.model_dump_json()}}}')

    async def _enrol(self, request: web.Request) -> Document:
        enrolment = await self._parsed(request, Enrolment)
        if enrolment.join_token != self.join_token or self.joined:
            raise RefusalError(401, "invalid_join_token")
        self.joined += 1
        return Enrolled(node_id="node-1", node_token=self.node_token, pool_slug="demo")

    async def _register(self, request: web.Request) -> Document:
        self._authenticate(request)
        registration = await self._parsed(request, Registration)
        if registration.boot_id != self.boot_id:
            self.boot_id = registration.boot_id
            self.epoch += 1
            self._wake_held_calls()
        return Registered(epoch=self.epoch, at=self._now())

    async def _heartbeat(self, request: web.Request) -> Document:
        self._authenticate(request)
        heartbeat = await self._parsed(request, Heartbeat)
        self._check_epoch(heartbeat.epoch)
        self.heartbeats.append(heartbeat)
        return Acknowledged(at=self._now())

    async def _orders(self, request: web.Request) -> Document | None:
        self._authenticate(request)
        query = request.query
        deadline = asyncio.get_running_loop().time() + float(query["wait_s"])
        while True:
            self._check_epoch(int(query["epoch"]))
            if self.orders is not None:
                newest = self.orders.entitlements
                if newest.store_id != query["store_id"] or newest.revision > int(query["revision"]):
                    return self.orders
            left_s = deadline - asyncio.get_running_loop().time()
            if left_s <= 0:
                return None
            try:
                await asyncio.wait_for(self._changed.wait(), left_s)
            except TimeoutError:
                return None

    async def _reports(self, request: web.Request) -> Document:
        self._authenticate(request)
        batch = await self._parsed(request, ReportBatch)
        self._check_epoch(batch.epoch)
        if self.poisoned & {report.sequence for report in batch.reports}:
            raise RefusalError(422, "invalid_request")
        self.batches.append(list(batch.reports))
        fresh = {(report.boot_id, report.sequence): report for report in batch.reports}
        stored = len(fresh.keys() - self.reports.keys())
        self.reports |= fresh
        return ReportsStored(stored=stored, duplicates=len(batch.reports) - stored)

    def _authenticate(self, request: web.Request) -> None:
        if request.headers.get("Authorization") != f"Bearer {self.node_token}":
            raise RefusalError(401, "invalid_node_token")

    def _check_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            raise RefusalError(409, "stale_epoch" if epoch < self.epoch else "unknown_epoch")

    async def _parsed(self, request: web.Request, model: type[Body]) -> Body:
        try:
            return model.parse(await request.read(), "body")
        except ContractError:
            raise RefusalError(422, "invalid_request") from None

    def _wake_held_calls(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _now(self) -> datetime.datetime:
        return datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=self.clock_ahead_s)
