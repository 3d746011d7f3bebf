"""The agent's side of `contract/nodes.py`: one method for each call to the control plane.

LinkError
  UnreachableError   no answer that can be used: try again, it may come back
  RefusedError       the control plane understood and says no
  ReplacedError      another agent has registered for this node: end
  UnknownEpochError  the control plane's database is an older one: register again
"""

from __future__ import annotations

import contextlib
import json
import time
from types import TracebackType
from typing import Self, TypeVar

import aiohttp

from agent.clock import ClockOffset
from contract.documents import Document
from contract.errors import ContractError
from contract.nodes import (
    Acknowledged,
    Answer,
    Enrolled,
    Enrolment,
    Heartbeat,
    Orders,
    Registered,
    Registration,
    ReportBatch,
    ReportsStored,
)

MAX_ANSWER_BYTES = 64 * 1024 * 1024
_CONNECT_S = 5.0
_TRY_AGAIN = frozenset({408, 425, 429})

Data = TypeVar("Data", bound=Document)


class LinkError(Exception):
    """A call that did not succeed."""


class UnreachableError(LinkError):
    """No answer, none in time, or none that keeps to the contract."""


class RefusedError(LinkError):
    """A refusal that the same call would get again."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class ReplacedError(LinkError):
    """This agent's epoch is over: another one has registered for the node since."""


class UnknownEpochError(LinkError):
    """The control plane never gave out this agent's epoch: its database was restored from a copy."""


class Link:
    """Calls to one control plane. Every method raises LinkError and takes `call_s` at most."""

    def __init__(self, url: str, call_s: float) -> None:
        self.clock = ClockOffset()
        self.token: str | None = None
        """The node's; all calls but `enrol` need it."""
        self.heard_at = time.monotonic()
        """When a call last succeeded; before the first, when the link was made."""
        self._url = url.rstrip("/")
        self._call_s = call_s
        self._session = aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar())

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    async def enrol(self, enrolment: Enrolment) -> Enrolled:
        """Become a node of the pool. The join token is used up, even if the answer is lost."""
        return _present(await self._call("POST", "enrol", Answer[Enrolled], enrolment))

    async def register(self, registration: Registration) -> Registered:
        """Begin an epoch, and end that of any other agent of this node."""
        sent_at = time.time()
        registered = _present(await self._call("POST", "register", Answer[Registered], registration))
        self.clock.measure(sent_at, time.time(), registered.at.timestamp())
        return registered

    async def heartbeat(self, heartbeat: Heartbeat) -> Acknowledged:
        """Give a sign of life."""
        sent_at = time.time()
        acknowledged = _present(await self._call("POST", "heartbeat", Answer[Acknowledged], heartbeat))
        self.clock.measure(sent_at, time.time(), acknowledged.at.timestamp())
        return acknowledged

    async def orders(self, epoch: int, store_id: str, revision: int, wait_s: float) -> Orders | None:
        """Orders newer than these; None if there are none within `wait_s`."""
        query = {
            "epoch": str(epoch),
            "store_id": store_id,
            "revision": str(revision),
            "wait_s": f"{wait_s:g}",
        }
        return await self._call("GET", "orders", Answer[Orders], query=query, wait_s=wait_s)

    async def report(self, batch: ReportBatch) -> ReportsStored:
        """Hand over reports; they are stored when this returns."""
        return _present(await self._call("POST", "reports", Answer[ReportsStored], batch))

    async def _call(
        self,
        method: str,
        name: str,
        answer: type[Answer[Data]],
        body: Document | None = None,
        *,
        query: dict[str, str] | None = None,
        wait_s: float = 0.0,
    ) -> Data | None:
        headers = {"Content-Type": "application/json"}
        if self.token is not None:
            headers["Authorization"] = f"Bearer {self.token}"
        timeout = aiohttp.ClientTimeout(total=self._call_s + wait_s, sock_connect=_CONNECT_S)
        try:
            async with self._session.request(
                method,
                f"{self._url}/internal/{name}",
                data=None if body is None else body.model_dump_json(),
                params=query,
                headers=headers,
                timeout=timeout,
                # A token goes to the address that the operator gave, and nowhere else.
                allow_redirects=False,
            ) as response:
                content = await _read(response)
        except TimeoutError:
            raise UnreachableError(f"{self._url} did not answer in time") from None
        except (aiohttp.ClientError, OSError) as error:
            raise UnreachableError(f"{self._url}: {error or type(error).__name__}") from None
        data = _data(response.status, content, answer, name)
        self.heard_at = time.monotonic()
        return data


async def _read(response: aiohttp.ClientResponse) -> bytes:
    content = bytearray()
    async for chunk in response.content.iter_any():
        content += chunk
        if len(content) > MAX_ANSWER_BYTES:
            raise UnreachableError(f"{response.url}: an answer of more than {MAX_ANSWER_BYTES // 2**20} MiB")
    return bytes(content)


def _data(status: int, content: bytes, answer: type[Answer[Data]], name: str) -> Data | None:
    if status == 204:
        return None
    if status not in (200, 201):
        raise _refusal(status, content)
    try:
        return answer.parse(content, name).data
    except ContractError as error:
        raise UnreachableError(f"refused an answer that does not keep to the contract: {error}") from None


def _refusal(status: int, content: bytes) -> LinkError:
    code, message = "", content[:200].decode(errors="replace")
    with contextlib.suppress(ValueError, KeyError, TypeError):
        error = json.loads(content)["error"]
        code, message = str(error["code"]), str(error["message"])
    text = " ".join(f"status {status} {code}: {message}"[:500].split())
    if status == 409 and code == "stale_epoch":
        return ReplacedError(text)
    if status == 409 and code == "unknown_epoch":
        return UnknownEpochError(text)
    if 400 <= status < 500 and status not in _TRY_AGAIN:
        return RefusedError(status, text)
    return UnreachableError(text)


def _present(data: Data | None) -> Data:
    if data is None:
        raise UnreachableError("status 204 where an answer belongs")
    return data
