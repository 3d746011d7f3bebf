"""Keeps one serving process as the orders want it: starts, adopts, watches, drains and restarts it.

| state | process | becomes |
|---|---|---|
| stopped | none, none wanted | starting, when orders want one |
| starting | runs, not ready yet | ready; failed, if it ends |
| ready | runs, takes requests | draining, if the orders change; failed, if it ends or hangs |
| draining | has been told to end | stopped; starting, if another is wanted |
| failed | none, one wanted | starting, after a delay |
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from pathlib import Path

from agent.home import write_whole
from agent.options import Options
from agent.process import Launch, Record, ServingLog, ServingProcess
from agent.sampler import Glimpse, Sampler
from agent.watchdog import Backoff, Silence, Stall
from contract.capacity import NodeCapacity
from contract.errors import ContractError
from contract.nodes import Orders, ServingState

log = logging.getLogger("boosts.agent")


class Supervisor:
    """The node's serving process.

    One task, `run`, starts and ends processes, so there are never two of them. Canceling it leaves
    serving running, with a record for the next agent. Without orders, because the disk has lost them,
    nothing is started and what runs is left alone.
    """

    def __init__(self, options: Options, sampler: Sampler) -> None:
        self.news = asyncio.Event()
        """Set when `state` has changed; whoever waits for it clears it."""
        self.problem: str | None = None
        """Why serving is not ready, for people."""
        self.restarts = 0
        self.capacity: NodeCapacity | None = None
        """What the running serving process has measured of itself."""
        self._options = options
        self._pace = options.pace
        self._sampler = sampler
        self._log = ServingLog(options.home)
        self._record = options.home / "serving.json"
        self._backoff = Backoff(self._pace.restart_first_s, self._pace.restart_most_s)
        self._ordered = False
        self._wanted: Launch | None = None
        self._process: ServingProcess | None = None
        self._silence = Silence(self._pace.silence_s, was_ready=False)
        self._stall = Stall(self._pace.stall_s)
        self._ready_since: float | None = None
        self._ready = False
        self._answered_at = 0.0
        self._draining = False
        self._failed = False
        self._start_at = 0.0
        self._leaving = False
        self._wake = asyncio.Event()
        self._left = asyncio.Event()
        self._told = ServingState.STOPPED

    @property
    def state(self) -> ServingState:
        if self._process is None:
            if self._wanted is None or self._leaving:
                return ServingState.STOPPED
            return ServingState.FAILED if self._failed else ServingState.STARTING
        if self._draining:
            return ServingState.DRAINING
        return ServingState.READY if self._ready else ServingState.STARTING

    @property
    def model_id(self) -> str | None:
        """The model being served, or loaded."""
        launch = self._wanted if self._process is None else self._process.launch
        return None if launch is None or self.state is ServingState.STOPPED else launch.model_id

    @property
    def wanted(self) -> bool:
        return self._wanted is not None

    def follow(self, orders: Orders) -> None:
        """Have serving run, or not run, as these orders say from now on."""
        wanted = launch_for(self._options, orders) if orders.serve else None
        if wanted != self._wanted:
            # Whatever failed before was another command.
            self._backoff.reset()
            self._start_at = 0.0
            self._failed = False
            self.problem = None
        self._ordered = True
        self._wanted = wanted
        self._wake.set()

    def adopt(self) -> None:
        """Take over the serving process that an earlier agent left running, if there is one."""
        record = _read_record(self._record)
        if record is None:
            return
        self._take(ServingProcess.adopt(record, self._wake.set))
        if self._process is None:
            log.warning("serving of an earlier agent, process %d, is gone", record.pid)
        else:
            log.info("adopted serving, process %d", record.pid)

    async def run(self) -> None:
        """Work until canceled."""
        while True:
            # Before the step: what changes during it is for the next one.
            self._wake.clear()
            await self._step()
            self._tell()
            self._log.bound()
            await wait(self._wake, self._until_next_look())

    async def stop(self) -> None:
        """Drain and end serving; returns when it is gone, or will not go."""
        self._leaving = True
        self._wake.set()
        await self._left.wait()

    async def _step(self) -> None:
        process = self._process
        if process is None:
            if self._leaving:
                self._left.set()
            elif self._wanted is not None and time.monotonic() >= self._start_at:
                self._start(self._wanted)
        elif process.ended.is_set() and (self._leaving or (self._ordered and self._wanted is None)):
            self._forget()
        elif process.ended.is_set():
            self._record_failure(f"serving {process.status}")
        elif self._leaving or (self._ordered and process.launch != self._wanted):
            log.info("draining serving, process %d", process.record.pid)
            if await self._end(process, self._options.drain_s + self._pace.kill_s):
                self._forget()
            elif self._leaving:
                self._left.set()
        else:
            await self._watch(process)

    def _start(self, launch: Launch) -> None:
        if self._failed:
            self.restarts += 1
        # Serving is configured by its command; what else is named so may be a secret of other parts.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("BOOSTS_")}
        try:
            process = ServingProcess.start(
                launch, self._log, environment, remember=self._remember, on_end=self._wake.set
            )
        except OSError as error:
            self._record_failure(f"serving cannot be started: {error}")
        else:
            self._take(process)
            log.info("started serving, process %d: %s", process.record.pid, launch.model_id)

    def _take(self, process: ServingProcess | None) -> None:
        self._process = process
        self._ready = False
        self._ready_since = None
        self.capacity = None
        self._silence = Silence(
            self._pace.silence_s, was_ready=process is not None and process.record.was_ready
        )
        self._stall = Stall(self._pace.stall_s)

    async def _watch(self, process: ServingProcess) -> None:
        glimpse = await self._sampler.look(process.launch.stats_port)
        now = time.monotonic()
        self._note_readiness(process, glimpse, now)
        hung = None
        if self._silence.observe(answered=glimpse.answered, ready=glimpse.ready, now=now):
            hung = f"serving's stats port has not answered for {self._pace.silence_s:g} s"
        if glimpse.report is not None and glimpse.report.capacity is not None:
            # Serving may have loaded the pool's model from a folder: to others it is the pool's.
            named = {"model_id": process.launch.model_id}
            self.capacity = glimpse.report.capacity.model_copy(update=named)
        if glimpse.report is not None and self._stall.observe(glimpse.report, now):
            hung = f"the engine has made no token for {self._pace.stall_s:g} s, with work in flight"
        if hung is not None and not process.ended.is_set():
            log.error("%s: restarting it", hung)
            await self._end(process, self._pace.kill_s)
            if process.ended.is_set():
                self._record_failure(hung)

    def _note_readiness(self, process: ServingProcess, glimpse: Glimpse, now: float) -> None:
        if glimpse.answered:
            self._answered_at = now
        elif self._ready and now - self._answered_at < self._pace.doubt_s:
            return
        self._ready = glimpse.ready
        if glimpse.ready:
            self.problem = None
        elif self._ready_since is not None:
            self.problem = f"serving was ready and is not any more: {glimpse.condition or 'no answer'}"
        if glimpse.ready and self._ready_since is None:
            self._ready_since = now
            log.info("serving is ready")
            with contextlib.suppress(OSError):
                self._remember(process.record.model_copy(update={"was_ready": True}))

    async def _end(self, process: ServingProcess, patience_s: float) -> bool:
        """SIGTERM, and after `patience_s` SIGKILL to its group; whether it is gone."""
        self._draining = True
        self._tell()
        give_up_at = time.monotonic() + patience_s
        process.terminate()
        while not process.ended.is_set() and time.monotonic() < give_up_at:
            await self._sampler.look(process.launch.stats_port)
            await wait(process.ended, self._pace.drain_sample_s)
        if not process.ended.is_set():
            log.error("serving has not ended within %g s of SIGTERM: killing it", patience_s)
            process.kill()
            await wait(process.ended, self._pace.kill_s)
        self._draining = False
        if process.ended.is_set():
            log.info("serving %s", process.status)
        else:
            log.error("process %d survives SIGKILL; the machine needs a reboot", process.record.pid)
        return process.ended.is_set()

    def _forget(self) -> None:
        self._sampler.flush()
        self._record.unlink(missing_ok=True)
        self._take(None)

    def _record_failure(self, what: str) -> None:
        """Serving ended, or did not start, though it is wanted: start it again after a delay."""
        now = time.monotonic()
        if self._ready_since is not None and now - self._ready_since >= self._pace.restart_forgiven_s:
            self._backoff.reset()
        delay_s = self._backoff.next_s()
        self._start_at = now + delay_s
        self._failed = True
        end_of_log = self._log.last_lines()
        self.problem = f"{what}\n{end_of_log}".strip()[:2000]
        log.error("%s; starting it again in %g s. The end of its log:\n%s", what, delay_s, end_of_log)
        if self._process is not None:
            self._forget()

    def _remember(self, record: Record) -> None:
        write_whole(self._record, record.model_dump_json(indent=2) + "\n")

    def _tell(self) -> None:
        if self.state is not self._told:
            self._told = self.state
            self.news.set()

    def _until_next_look(self) -> float:
        # On the wall clock's own grid, so that a look falls on each report's moment.
        pause_s = self._pace.sample_s - time.time() % self._pace.sample_s
        if self._process is None and self._wanted is not None:
            pause_s = min(pause_s, max(0.0, self._start_at - time.monotonic()))
        return pause_s


def launch_for(options: Options, orders: Orders) -> Launch:
    """Serving as the orders want it on this node."""
    command = (
        *options.serving,
        *("--model", options.model or orders.model_id, "--served-model-name", orders.model_id),
        *("--entitlements", str(options.home / "entitlements.json")),
        *("--host", options.host, "--port", str(options.port), "--stats-port", str(options.stats_port)),
        *("--drain-s", str(options.drain_s), "--", *orders.engine_flags, *options.engine_flags),
    )
    return Launch(model_id=orders.model_id, command=command, port=options.port, stats_port=options.stats_port)


def _read_record(path: Path) -> Record | None:
    try:
        return Record.parse(path.read_bytes(), path.name)
    except FileNotFoundError:
        return None
    except (ContractError, OSError) as error:
        log.error("%s; if serving of an earlier agent still runs, stop it by hand", error)
        return None


async def wait(event: asyncio.Event, timeout_s: float) -> None:
    """Until the event is set, or `timeout_s` have passed."""
    # Not `wait_for`: before Python 3.12 it loses a cancellation that comes together with the event.
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await event.wait()
