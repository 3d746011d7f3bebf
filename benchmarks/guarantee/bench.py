"""Runs the phases of the rows: both servers stay loaded and are measured in turns."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Collection, Coroutine, Sequence
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import psutil  # type: ignore[import-untyped]
import uvloop

from benchmarks.completions import Target
from benchmarks.guarantee.config import Config
from benchmarks.load import Client, ClosedLoop, Lengths, Phase, Visits, run_phase
from benchmarks.report import Check, Table
from benchmarks.seats import Seat, write_entitlements
from benchmarks.servers import SERVED_NAME, Progress, Server, ServerStartError
from contract.reports import parse_report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Rows = list[dict[str, Any]]

_SETTLE_S, _SETTLE_LOOK_S = 3.0, 0.2
_TAKE_OVER_S = 10.0
"""Within this a node follows its entitlements file; it looks four times a second."""


class NothingServedError(Exception):
    """A phase that others are measured against produced no tokens."""


@dataclass(frozen=True, slots=True)
class Part:
    """What one row has to say."""

    figures: dict[str, Any]
    tables: tuple[Table, ...]
    checks: tuple[Check, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the scenario: how to measure it and what to make of it."""

    name: str
    about: str
    seconds: Callable[[Config], float]
    """About how long it takes."""
    measure: Callable[[Bench], Rows]
    """Its raw data, one dictionary per measured phase."""
    summarize: Callable[[dict[str, Any], Rows], Part]
    """From the configuration and the row's data."""
    plot: Callable[[Axes, Rows, Part], None]
    several_starts: bool = False
    """Whether starts of one server differ by what matters to the row's target."""


@dataclass(frozen=True, slots=True)
class LedgerReading:
    """A node's counters of one seat, s since the phase began."""

    at_s: float
    owed_tokens: float
    output_tokens: int


@dataclass(frozen=True, slots=True)
class _Cpu:
    """Processor seconds used so far, or cores: by whom."""

    generator: float
    idle_server: float
    other: float
    """By all that is no part of the measurement."""

    def cores_since(self, earlier: _Cpu, elapsed_s: float) -> _Cpu:
        pairs = zip(astuple(self), astuple(earlier), strict=True)
        return _Cpu(*((now - then) / elapsed_s for now, then in pairs))


@dataclass(slots=True)
class Bench:
    """The servers under test and what the rows do with them."""

    config: Config
    plain: Server
    seats: Server
    entitlements: Path
    progress: Progress
    revision: int = 1
    readings: list[LedgerReading] = field(default_factory=list)
    """Of the seat that the last phase watched."""

    @property
    def servers(self) -> tuple[Server, Server]:
        return self.plain, self.seats

    def sell(self, seats: Sequence[Seat], guarantee_tok_s: float) -> None:
        """Give the node these seats and no others, and wait until it has taken that over."""
        self.revision += 1
        write_entitlements(seats, self.entitlements, guarantee_tok_s=guarantee_tok_s, revision=self.revision)
        until = time.monotonic() + _TAKE_OVER_S
        while self.seats.report().entitlements_revision < self.revision:
            if time.monotonic() > until:
                raise ServerStartError(f"the node did not take over revision {self.revision} of its seats")
            time.sleep(0.1)

    def target(self, server: Server, seat: Seat) -> Target:
        return Target(server.launch.base_url, SERVED_NAME, seat.key)

    def crowd(
        self,
        server: Server,
        seat: Seat,
        connections: int,
        output: Lengths,
        round_name: str,
        visits: Visits | None = None,
    ) -> ClosedLoop:
        """Many streams of random lengths; the requests of one `round_name` are the same on every server."""
        return ClosedLoop(
            seat.name,
            self.target(server, seat),
            connections,
            self.config.noisy_input,
            output,
            f"{self.config.seed}/{round_name}",
            visits=visits,
        )

    def owed_stream(self, server: Server, seat: Seat, round_name: str) -> ClosedLoop:
        """One stream after another, whose tokens are timed."""
        config = self.config
        return ClosedLoop(
            seat.name,
            self.target(server, seat),
            1,
            config.owed_input,
            config.owed_output,
            f"{config.seed}/{round_name}",
            timeline=True,
        )

    def phase(
        self,
        server: Server,
        clients: Sequence[Client],
        *,
        window_s: float,
        warm_s: float | None = None,
        sample_s: float | None = None,
        watched: Seat | None = None,
        refusable: Collection[str] = (),
        drain_s: float = 30.0,
    ) -> tuple[Phase, dict[str, Any]]:
        """Run one phase; returns it and what every row's data begins with.

        `watched` is a seat whose ledger to read each second. For the clients named in `refusable` 503 is an
        answer and no error. Paced requests have `drain_s` to be answered after the window.
        """
        warm_s = self.config.warm_s if warm_s is None else warm_s
        self._settle(server)
        used, began_s = self._used(server), time.monotonic()
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            run = run_phase(clients, warm_s=warm_s, window_s=window_s, sample_s=sample_s, drain_s=drain_s)
            phase = runner.run(self._watching(server, watched, run))
        ran_s = time.monotonic() - began_s
        cores = self._used(server).cores_since(used, ran_s)
        failed = [
            record
            for record in phase.records
            if record.error is not None and not (record.status == 503 and record.client in refusable)
        ]
        return phase, {
            "system": server.launch.name,
            "window_s": phase.window_s,
            "ran_s": ran_s,
            "total_tok_s": sum(phase.output_tok_s(name) for name in phase.served),
            "errors": len(failed),
            "first_error": failed[0].error if failed else None,
            "max_lag_s": phase.max_lag_s,
            "generator_cores": cores.generator,
            "idle_server_cores": cores.idle_server,
            "other_cores": cores.other,
        }

    def _settle(self, next_up: Server) -> None:
        """Wait until the other server has ended what its clients left behind."""
        until = time.monotonic() + _SETTLE_S
        used_s = self._idle_cpu_s(next_up)
        while time.monotonic() < until:
            time.sleep(_SETTLE_LOOK_S)
            before_s, used_s = used_s, self._idle_cpu_s(next_up)
            if used_s - before_s < 0.1 * _SETTLE_LOOK_S:
                return

    def _idle_cpu_s(self, busy: Server) -> float:
        return sum(server.cpu_s() for server in self.servers if server is not busy)

    def _used(self, busy: Server) -> _Cpu:
        idle_server_s, generator_s = self._idle_cpu_s(busy), time.process_time()
        times = psutil.cpu_times()
        whole_s = times.user + times.system + times.nice + getattr(times, "softirq", 0.0)
        return _Cpu(generator_s, idle_server_s, whole_s - generator_s - idle_server_s - busy.cpu_s())

    async def _watching(self, server: Server, watched: Seat | None, run: Coroutine[Any, Any, Phase]) -> Phase:
        self.readings = []
        watch = None
        if watched is not None and server.launch.stats_url:
            watch = asyncio.create_task(self._watch_ledger(server.launch.stats_url, watched.name))
        try:
            return await run
        finally:
            if watch is not None:
                watch.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await watch

    async def _watch_ledger(self, url: str, pledge_id: str) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        async with aiohttp.ClientSession() as session:
            while True:
                async with session.get(url) as answer:
                    report = parse_report(await answer.read())
                at_s = loop.time() - began
                for seat in report.seats:
                    if seat.pledge_id == pledge_id:
                        self.readings.append(LedgerReading(at_s, seat.owed_tokens, seat.output_tokens))
                await asyncio.sleep(1.0 - at_s % 1.0)


def some(tok_s: float) -> float:
    """The rate, if there was any. Raises NothingServedError: nothing can be compared with 0."""
    if tok_s > 0:
        return tok_s
    raise NothingServedError("a server produced nothing while it was measured: is the machine overloaded?")


def tell(bench: Bench, row: str, number: int, of: int, what: str) -> None:
    """A progress line."""
    bench.progress(f"{row}, {number} of {of}: {what}")
