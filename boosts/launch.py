"""From an open demo pool to one that answers: what `boosts run` watches, writes down and tells meanwhile."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable
from typing import Any

import httpx

from agent.identity import load_identity
from boosts.client import AdminPool, Client, Refused, ShownNode, Unreachable
from boosts.demo_file import DemoFile
from boosts.demo_pool import DemoKeys, find_pledge
from boosts.progress import Progress, engine_stage
from boosts.settings import StackError, StackSettings
from boosts.welcome import funding_message, welcome

_LOOK_EVERY_S = 1.0
_LOST_STARTS = 3
"""Serving that ended this often before it was ever ready will not be ready the next time either."""


class Launch:
    """Follows the demo pool until it is live. `wait` lets time pass while the processes are seen to.

    demo.json is there as soon as it can be used: with the demo customer's key, or without one while
    the pool stays in funding.
    """

    def __init__(
        self,
        settings: StackSettings,
        model_path: str,
        keys: DemoKeys,
        progress: Progress,
        wait: Callable[[float], None],
    ) -> None:
        self._settings = settings
        self._model_path = model_path
        self._keys = keys
        self._progress = progress
        self._wait = wait
        self._began = time.time()
        self._told: tuple[Any, ...] = ()
        self._restarts = 0
        self._problem = ""

    def follow(self, operator: Client, customer: Client) -> None:
        """Return when inference answers. Raises StackError and ClientError."""
        while not self._look(operator, customer):
            self._wait(_LOOK_EVERY_S)

    def _look(self, operator: Client, customer: Client) -> bool:
        """Whether the pool is live; tells what is new."""
        try:
            [pool] = [pool for pool in operator.admin_pools() if pool["slug"] == self._settings.terms.slug]
            match pool["status"]:
                case "active":
                    self._watch_engine(operator)
                    return self._check_live(customer, pool)
                case "funding" if pool["pledgedSlots"] < pool["minSeats"]:
                    self._tell(customer, pool, funding_message(pool, self._settings.home))
                case "activating" | "funding":
                    self._watch_engine(operator)
                    self._tell_problem(pool)
                case status:
                    resume = f"boosts admin pools resume {pool['slug']}"
                    self._tell(customer, pool, f"pool {pool['slug']} is {status}; to go on: {resume}")
        except (Unreachable, Refused) as error:
            if isinstance(error, Refused) and error.status < 500:
                raise
            self._progress.show("waiting for the control plane")
        return False

    def _check_live(self, customer: Client, pool: AdminPool) -> bool:
        key = _boost_key(customer, pool)
        if not self._inference_answers(key):
            return False
        self._write(pool, key)
        self._progress.say(f"ready after {time.time() - self._began:.0f} s")
        self._progress.say(welcome(self._settings, pool["modelId"], key))
        return True

    def _inference_answers(self, key: str | None) -> bool:
        """Whether the node takes the key; without one, whether it is ready."""
        url = f"{self._settings.inference_url}/v1/models" if key else f"{self._settings.stats_url}/readyz"
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        try:
            status = httpx.get(url, headers=headers, timeout=2.0, trust_env=False).status_code
        except httpx.TransportError:
            return False
        # 401: it has not heard of the pledge yet. 402 and 429: it has, and has reasons of the pledge's own.
        return status in (200, 402, 429)

    def _watch_engine(self, operator: Client) -> None:
        """Show how far vLLM is. Raises StackError when it ends again and again."""
        self._progress.show(engine_stage(self._settings.node_home / "serving.log", self._began))
        node = self._node(operator)
        if node is None:
            return
        restarts, failed = node["restarts"], node["state"] == "failed"
        if failed and restarts + 1 >= _LOST_STARTS:
            raise StackError(f"serving does not start: {node['problem']}")
        if failed and restarts >= self._restarts:
            self._restarts = restarts + 1
            self._progress.say(f"serving failed and is started again: {node['problem']}")

    def _node(self, operator: Client) -> ShownNode | None:
        """Our node as the control plane knows it; None until it was heard of in this run."""
        identity = load_identity(self._settings.node_home)
        for node in operator.nodes():
            if identity is not None and node["id"] == identity.node_id:
                heard = node["lastHeartbeatAt"]
                if heard and datetime.datetime.fromisoformat(heard).timestamp() >= self._began:
                    return node
        return None

    def _tell(self, customer: Client, pool: AdminPool, message: str) -> None:
        """Say how the pool stands when that has changed, and let others find it."""
        now = (pool["status"], pool["pledgedSlots"])
        if now != self._told:
            self._write(pool, _boost_key(customer, pool))
            self._progress.say(message)
        self._told = now

    def _tell_problem(self, pool: AdminPool) -> None:
        """What keeps a pool from going live whose node is ready: waiting does not mend it."""
        problem = pool["activationProblem"]
        if problem is not None and problem["code"] != "no_ready_node" and problem["message"] != self._problem:
            self._problem = problem["message"]
            self._progress.say(f"pool {pool['slug']} does not go live: {problem['message']}")

    def _write(self, pool: AdminPool, boost_key: str | None) -> None:
        settings = self._settings
        DemoFile(
            control_plane_url=settings.control_plane_url,
            operator_key=self._keys.operator,
            customer_key=self._keys.customer,
            pool_slug=pool["slug"],
            inference_url=settings.inference_url,
            boost_key=boost_key,
            model=pool["modelId"],
            model_path=self._model_path,
            stats_url=settings.stats_url,
            agent_url=settings.agent_url,
        ).write(settings.home)


def _boost_key(customer: Client, pool: AdminPool) -> str | None:
    pledge = find_pledge(customer, pool["slug"])
    return pledge["key"]["apiKey"] if pledge and pledge["key"] else None
