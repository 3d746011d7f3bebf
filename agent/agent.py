"""The agent: a supervisor that always works, and a conversation with a control plane that may be away.

Whatever goes wrong here, serving is left running: the next agent adopts it. Only an operator's stop
and the orders end it.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import random
import secrets
import signal
import socket
import sqlite3
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

from agent.endpoints import Endpoints, Standing
from agent.gpu import GpuWatch
from agent.home import StartError
from agent.identity import ENROL_AGAIN, load_identity, save_identity
from agent.link import Link, LinkError, RefusedError, ReplacedError, UnknownEpochError
from agent.options import Options
from agent.orders import OrdersStore
from agent.reporter import Reporter
from agent.sampler import Sampler
from agent.spool import Spool
from agent.supervisor import Supervisor, wait
from agent.watchdog import Backoff
from contract.errors import ContractError
from contract.nodes import Enrolled, Enrolment, Heartbeat, Registration

STOPPED = 0
FAILED = 1
REPLACED = 3

_LEAST_HOLD_S = 1.0
"""An answer without news that comes sooner than this is not a held request: do not ask in a circle."""

log = logging.getLogger("boosts.agent")
Answer = TypeVar("Answer")


class Ending(enum.Enum):
    """How the operator wants the agent to end."""

    STOP = "stop"
    """Drain and stop serving, too."""
    HAND_OVER = "hand over"
    """Leave serving to the next agent, of a newer version say."""


_SIGNALS = {
    signal.SIGTERM: Ending.STOP,
    signal.SIGINT: Ending.STOP,
    signal.SIGHUP: Ending.STOP,
    signal.SIGUSR2: Ending.HAND_OVER,
}


async def run(options: Options) -> int:
    """Run the node until a signal ends it; returns the exit status. Raises StartError."""
    async with opened(options) as agent:
        agent.obey_signals()
        return await agent.run()


@contextlib.asynccontextmanager
async def opened(options: Options) -> AsyncIterator[Agent]:
    """An agent with all it holds open, which is closed in the end. Raises StartError."""
    async with contextlib.AsyncExitStack() as held:
        listener = held.enter_context(_listen(options.agent_port))
        identity = load_identity(options.home)
        if identity is None and options.join_token is None:
            raise StartError(
                f"this node has not joined a pool yet ({options.home} has no node.json): "
                "ask the pool's operator for a join token and give it with --join-token"
            )
        try:
            spool = held.enter_context(contextlib.closing(Spool(options.home / "spool.db")))
        except sqlite3.Error as error:
            raise StartError(f"{options.home / 'spool.db'}: {error}") from None
        link = await held.enter_async_context(Link(options.control_plane, options.pace.call_s))
        sampler = await held.enter_async_context(Sampler(spool.put, options.pace))
        yield Agent(options, listener, identity, link, spool, Supervisor(options, sampler))


def _listen(port: int) -> socket.socket:
    try:
        return socket.create_server(("127.0.0.1", port))
    except OSError as error:
        raise StartError(
            f"cannot listen on 127.0.0.1:{port}: {error.strerror}; give another --agent-port"
        ) from None


class Agent:
    """One agent's life, from its first signal handler to its last report."""

    def __init__(
        self,
        options: Options,
        listener: socket.socket,
        identity: Enrolled | None,
        link: Link,
        spool: Spool,
        supervisor: Supervisor,
    ) -> None:
        self._options = options
        self._listener = listener
        self._pace = options.pace
        self._identity = identity
        self._link = link
        self._spool = spool
        self._supervisor = supervisor
        self._reporter = Reporter(spool, link)
        self._orders = OrdersStore(options.home)
        self._gpus = GpuWatch(self._pace.heartbeat_s)
        self._troubles = Troubles()
        self._boot_id = secrets.token_hex(8)
        self._epoch: int | None = None
        self._asked: asyncio.Future[Ending] = asyncio.get_running_loop().create_future()

    async def run(self) -> int:
        """Work until asked to end, replaced, or refused at enrolment; returns the exit status."""
        endpoints = Endpoints(self._standing)
        await endpoints.start(self._listener)
        self._gpus.start()
        self._orders.load()
        self._supervisor.adopt()
        if self._orders.current is not None:
            self._supervisor.follow(self._orders.current)
        status = STOPPED
        try:
            async with asyncio.TaskGroup() as group:
                workers = [group.create_task(self._supervisor.run()), group.create_task(self._converse())]
                ending = await self._asked
                log.info("asked to %s", ending.value)
                if ending is Ending.STOP:
                    await self._supervisor.stop()
                for worker in workers:
                    worker.cancel()
        except* ReplacedError as errors:
            log.error("another agent has taken over this node, which serves on: %s", _first(errors))
            status = REPLACED
        except* StartError as errors:
            log.error("%s", _first(errors))
            status = FAILED
        finally:
            await endpoints.stop()
        if status == STOPPED and self._asked.result() is Ending.STOP:
            await self._say_farewell()
        return status

    def obey_signals(self) -> None:
        """Have this process's signals end the agent."""
        loop = asyncio.get_running_loop()
        for number, ending in _SIGNALS.items():
            # Under nohup a terminal that closes is no reason to stop.
            if signal.getsignal(number) is not signal.SIG_IGN:
                loop.add_signal_handler(number, self.ask, ending)

    def ask(self, ending: Ending) -> None:
        """End the agent; the first to ask decides how."""
        if self._asked.done():
            log.info("ending already; draining takes %d s at most", self._options.drain_s)
        else:
            self._asked.set_result(ending)

    # --- with the control plane ----------------------------------------------------------------------

    async def _converse(self) -> None:
        try:
            if self._identity is None:
                self._identity = await self._insist("enrolment", self._enrol)
            self._link.token = self._identity.node_token
            while True:
                await self._converse_for_an_epoch(self._identity)
        except* ReplacedError:
            # On the way out there is nothing left to hand over; let the drain run its course.
            if not self._asked.done():
                raise

    async def _converse_for_an_epoch(self, identity: Enrolled) -> None:
        """Until the control plane does not know the epoch any more."""
        registration = Registration(boot_id=self._boot_id, base_url=self._options.base_url)
        registered = await self._insist("registration", lambda: self._link.register(registration))
        self._epoch = registered.epoch
        log.info("registered as %s, epoch %d", identity.node_id, registered.epoch)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._send_heartbeats(registered.epoch))
                group.create_task(self._follow_orders(registered.epoch))
                group.create_task(self._send_reports(registered.epoch))
        except* UnknownEpochError as errors:
            log.warning("registering again: %s", _first(errors))
            await asyncio.sleep(self._pace.retry_first_s)

    async def _enrol(self) -> Enrolled:
        assert self._options.join_token is not None
        try:
            enrolled = await self._link.enrol(
                Enrolment(join_token=self._options.join_token, name=self._options.name)
            )
        except RefusedError as error:
            raise StartError(
                f"the control plane refuses the join token ({error}); ask the pool's operator for a new one"
            ) from None
        save_identity(self._options.home, enrolled)
        log.info("joined pool %s as %s", enrolled.pool_slug, enrolled.node_id)
        return enrolled

    async def _send_heartbeats(self, epoch: int) -> None:
        while True:
            self._supervisor.news.clear()
            await self._insist("heartbeat", lambda: self._link.heartbeat(self._heartbeat(epoch)))
            await wait(self._supervisor.news, self._pace.heartbeat_s)

    async def _follow_orders(self, epoch: int) -> None:
        backoff = self._new_backoff()
        while True:
            asked_at = time.monotonic()
            news = await self._insist("orders", lambda: self._take_orders(epoch))
            held_s = time.monotonic() - asked_at
            if news or held_s >= min(_LEAST_HOLD_S, self._pace.orders_wait_s):
                backoff.reset()
            else:
                await asyncio.sleep(backoff.next_s())

    async def _take_orders(self, epoch: int) -> bool:
        """Whether there were new ones."""
        store = self._orders
        orders = await self._link.orders(epoch, store.store_id, store.revision, self._pace.orders_wait_s)
        try:
            if orders is None or not store.accept(orders):
                return False
        except (ContractError, OSError) as error:
            raise LinkError(f"kept the orders in force, revision {store.revision}: {error}") from None
        log.info("orders revision %d: %s", store.revision, "serve" if orders.serve else "do not serve")
        self._supervisor.follow(orders)
        return True

    async def _send_reports(self, epoch: int) -> None:
        while True:
            if not await self._insist("reports", lambda: self._send_some(epoch)):
                await asyncio.sleep(self._pace.retry_first_s)

    async def _send_some(self, epoch: int) -> int:
        try:
            return await self._reporter.send_some(epoch)
        except sqlite3.Error as error:
            raise LinkError(f"the spool does not answer: {error}") from None

    async def _insist(self, what: str, call: Callable[[], Awaitable[Answer]]) -> Answer:
        """The answer of a call that is tried for as long as it takes."""
        backoff = self._new_backoff()
        while True:
            try:
                answer = await call()
            except (ReplacedError, UnknownEpochError):
                raise
            except LinkError as error:
                self._troubles.begin(what, self._advice(error))
                # Many nodes lose the control plane at once; they shall not all come back at once.
                await asyncio.sleep(backoff.next_s() * random.uniform(0.5, 1.0))
            else:
                self._troubles.end(what)
                return answer

    def _advice(self, error: LinkError) -> str:
        if isinstance(error, RefusedError) and error.status == 401:
            again = ENROL_AGAIN.format(home=self._options.home)
            return f"{error}; the control plane does not know this node's token. If that is right, {again}"
        return str(error)

    async def _say_farewell(self) -> None:
        """Tell what is left to tell, if the control plane listens; the rest stays in the spool."""
        if self._epoch is None:
            return
        with contextlib.suppress(LinkError, sqlite3.Error, TimeoutError):
            async with asyncio.timeout(self._pace.farewell_s):
                while await self._reporter.send_some(self._epoch):
                    pass
                await self._link.heartbeat(self._heartbeat(self._epoch))

    def _new_backoff(self) -> Backoff:
        return Backoff(self._pace.retry_first_s, self._pace.retry_most_s)

    # --- what others see -----------------------------------------------------------------------------

    def _standing(self) -> Standing:
        supervisor = self._supervisor
        return Standing(
            serving=supervisor.state,
            wanted=supervisor.wanted,
            model_id=supervisor.model_id,
            problem=supervisor.problem,
            restarts=supervisor.restarts,
            revision=self._orders.revision,
            spooled_reports=len(self._spool),
            sent_reports=self._reporter.sent,
            refused_reports=self._reporter.set_aside,
            contact_age_s=time.monotonic() - self._link.heard_at,
            clock_offset_s=self._link.clock.seconds,
            gpus=self._gpus.figures,
        )

    def _heartbeat(self, epoch: int) -> Heartbeat:
        standing = self._standing()
        offset_s = standing.clock_offset_s
        return Heartbeat(
            epoch=epoch,
            serving=standing.serving,
            model_id=standing.model_id,
            revision=standing.revision,
            restarts=standing.restarts,
            spooled_reports=standing.spooled_reports,
            clock_offset_ms=None if offset_s is None else offset_s * 1000,
            gpus=standing.gpus,
            problem=standing.problem,
            capacity=self._supervisor.capacity or self._options.capacity,
        )


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


class Troubles:
    """Logs each trouble when it begins or changes, and when it is over; not every time it is met."""

    def __init__(self) -> None:
        self._current: dict[str, str] = {}

    def begin(self, what: str, text: str) -> None:
        if self._current.get(what) != text:
            self._current[what] = text
            log.error("%s: %s. Trying again; the node goes on meanwhile", what, text)

    def end(self, what: str) -> None:
        if self._current.pop(what, None) is not None:
            log.info("%s: works again", what)
