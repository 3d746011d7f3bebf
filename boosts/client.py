"""The pools API as methods: one HTTP client for the command line and for `boosts run`.

Answers come back as the plain `data` of the envelope, so that `--json` can print them as they are;
the `TypedDict`s name the fields that we read.

    ClientError
     ├── Unreachable       nobody answered, or not in time
     └── Refused           the control plane said no: status, code, message
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, NotRequired, Self, TypedDict, cast
from urllib.parse import quote, urlsplit

import httpx

_TIMEOUT = httpx.Timeout(30.0, connect=5.0)
_RETRY_AFTER_S = 0.5
_LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})


class PoolSummary(TypedDict):
    id: str
    slug: str
    modelId: str
    modelName: str
    description: str
    infraSpec: str
    status: str
    totalSlots: int
    pledgedSlots: int
    minPricePerDay: str
    """The lowest monthly price of a block; the public API names it so."""


class HourSlot(TypedDict):
    id: str
    hour: int
    slotIndex: int
    pricePerDay: str
    status: str


class BlockSummary(TypedDict):
    seats: int
    available: int
    monthlyPrice: str


class PoolDetail(PoolSummary):
    minSeats: int
    guaranteeTokS: float
    rpmLimit: int
    tpmLimit: int
    blocks: dict[str, BlockSummary]
    hourSlots: list[HourSlot]


class BoostKey(TypedDict):
    id: str
    apiKey: str
    rpmLimit: int
    tpmLimit: int
    isActive: bool
    baseUrl: str | None


class Subscription(TypedDict):
    id: str
    poolId: str
    status: str
    monthlyPrice: str
    slotCount: int
    key: NotRequired[BoostKey]
    """In a live pool only."""


class PledgeHour(TypedDict):
    hour: int
    slotIndex: int
    pricePerDay: str


class Pledge(TypedDict):
    id: str
    status: str
    monthlyPrice: str
    currentPeriodEnd: str | None
    hours: list[PledgeHour]
    key: BoostKey | None


class BlockTerms(TypedDict):
    seats: int
    monthlyPrice: str


class Feasibility(TypedDict):
    """Whether one node honours so many seats of one block at once."""

    seats: int
    fits: bool
    fails: list[str]
    mostSeats: int | None
    stepNeededMs: float
    stepAllowedMs: float | None
    kvTokensNeeded: int
    kvTokens: int
    slots: int


class Problem(TypedDict):
    code: str
    message: str


class AdminPool(TypedDict):
    """A pool as its operator sees it: the terms, and how it stands."""

    id: str
    slug: str
    modelId: str
    modelName: str
    status: str
    blocks: dict[str, BlockTerms]
    minSeats: int
    guaranteeTokS: float
    nodes: int
    pledgedSlots: int
    feasibility: Feasibility | None
    """By the declared capacity."""
    activationProblem: Problem | None
    alarms: list[Problem]
    attainment60s: float | None


class CreatedAccount(TypedDict):
    id: str
    managementKey: str


class ShownAccount(TypedDict):
    id: str
    name: str
    email: str
    role: str
    createdAt: str


class JoinToken(TypedDict):
    joinToken: str
    expiresAt: str
    poolSlug: str


class Throughput(TypedDict):
    owedTokens: float
    deliveredTokens: int
    attainment: float | None
    inputTokens: int
    requests: int
    borrowedTokens: float
    heldS: float
    owedSeconds: int
    missedSeconds: int
    attainment1s: float | None
    attainment10s: float | None
    attainment60s: float | None


class ThroughputOfMinute(Throughput):
    minute: str


class MyThroughput(TypedDict):
    guaranteeTokS: float
    quantity: int
    minutes: list[ThroughputOfMinute]
    totals: Throughput


class ThroughputOfPledge(Throughput):
    pledgeId: str
    status: str
    seats: int
    shortfallTokens: float


class PoolThroughput(TypedDict):
    guaranteeTokS: float
    minutes: list[ThroughputOfMinute]
    pledges: list[ThroughputOfPledge]
    totals: Throughput


class ShownNode(TypedDict):
    """A node as its operator sees it."""

    id: str
    name: str
    poolSlug: str
    baseUrl: str | None
    state: str
    ready: bool
    lastHeartbeatAt: str | None
    restarts: int
    problem: str | None
    seats: int
    guaranteeTokS: float
    mostSeats: int | None
    busiestBlockSeats: int
    attainment60s: float | None


class Card(TypedDict):
    brand: str
    last4: str


class PoolPledge(TypedDict):
    """A pledge as billing sees it."""

    id: str
    poolId: str
    poolSlug: str
    status: str
    monthlyPrice: str
    currentPeriodEnd: str | None
    cancelAtPeriodEnd: bool
    hasKey: bool
    cancelUrl: str | None
    resumeUrl: str | None


class ClientError(Exception):
    """The call did not do what it was made for."""


class Unreachable(ClientError):  # noqa: N818 - names what happened
    """Nobody answered at the control plane's address, or not in time."""


class Refused(ClientError):  # noqa: N818 - names what happened
    """The control plane refused."""

    def __init__(self, status: int, code: str, message: str, details: Any = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.details = details


class Client:
    """One control plane, as the holder of one management key. Every method raises ClientError.

    POSTs carry an `Idempotency-Key`, so one that got no answer is sent a second time without harm.
    """

    def __init__(self, url: str, key: str) -> None:
        self.url = url.rstrip("/")
        self._http = httpx.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {key}"},
            timeout=_TIMEOUT,
            # A proxy that the environment names cannot reach this machine's own addresses.
            trust_env=urlsplit(self.url).hostname not in _LOOPBACK,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    # ---- customers ----

    def pools(self) -> list[PoolSummary]:
        return cast(list[PoolSummary], self._get("/api/pools"))

    def pool(self, pool: str) -> PoolDetail:
        return cast(PoolDetail, self._get(_pool(pool)))

    def subscribe(self, pool: str, blocks: Sequence[str], quantity: int) -> Subscription:
        body = {"blocks": list(blocks), "quantity": quantity}
        return cast(Subscription, self._post(f"{_pool(pool)}/subscribe", body))

    def my_pledge(self, pool: str) -> Pledge:
        return cast(Pledge, self._get(f"{_pool(pool)}/my-pledge"))

    def my_key(self, pool: str) -> BoostKey:
        return cast(BoostKey, self._get(f"{_pool(pool)}/my-key"))

    def my_throughput(self, pool: str, minutes: int) -> MyThroughput:
        return cast(MyThroughput, self._get(f"{_pool(pool)}/my-throughput", {"minutes": minutes}))

    def cancel(self, pool: str) -> dict[str, bool]:
        return cast(dict[str, bool], self._call("DELETE", f"{_pool(pool)}/pledge"))

    def set_payment_method(self, payment_method: str) -> Card:
        return cast(Card, self._post("/api/billing/payment-method", {"paymentMethod": payment_method}))

    def pledges(self) -> list[PoolPledge]:
        return cast(dict[str, list[PoolPledge]], self._get("/api/billing/portal"))["poolPledges"]

    def end_subscription(self, pledge_id: str) -> PoolPledge:
        return cast(PoolPledge, self._post(f"/api/billing/pledges/{quote(pledge_id)}/cancel"))

    def resume_subscription(self, pledge_id: str) -> PoolPledge:
        return cast(PoolPledge, self._post(f"/api/billing/pledges/{quote(pledge_id)}/resume"))

    # ---- operators ----

    def accounts(self) -> list[ShownAccount]:
        return cast(list[ShownAccount], self._get("/api/admin/accounts"))

    def create_account(self, name: str, email: str) -> CreatedAccount:
        body = {"name": name, "email": email}
        return cast(CreatedAccount, self._post("/api/admin/accounts", body))

    def replace_management_key(self, account: str) -> CreatedAccount:
        path = f"/api/admin/accounts/{quote(account, safe='')}/management-key"
        return cast(CreatedAccount, self._post(path))

    def admin_pools(self) -> list[AdminPool]:
        return cast(list[AdminPool], self._get("/api/admin/pools"))

    def admin_pool(self, pool: str) -> AdminPool:
        return cast(AdminPool, self._get(_admin_pool(pool)))

    def create_pool(self, terms: Mapping[str, Any]) -> AdminPool:
        return cast(AdminPool, self._post("/api/admin/pools", terms))

    def edit_pool(self, pool: str, changes: Mapping[str, Any]) -> AdminPool:
        return cast(AdminPool, self._call("PATCH", _admin_pool(pool), body=changes))

    def open_pool(self, pool: str) -> AdminPool:
        return cast(AdminPool, self._post(f"{_admin_pool(pool)}/open"))

    def pause_pool(self, pool: str) -> AdminPool:
        return cast(AdminPool, self._post(f"{_admin_pool(pool)}/pause"))

    def resume_pool(self, pool: str) -> AdminPool:
        return cast(AdminPool, self._post(f"{_admin_pool(pool)}/resume"))

    def new_join_token(self, pool: str) -> JoinToken:
        return cast(JoinToken, self._post(f"{_admin_pool(pool)}/join-tokens"))

    def nodes(self) -> list[ShownNode]:
        return cast(list[ShownNode], self._get("/api/admin/nodes"))

    def drain_node(self, node: str) -> ShownNode:
        return cast(ShownNode, self._post(f"/api/admin/nodes/{quote(node, safe='')}/drain"))

    def undrain_node(self, node: str) -> ShownNode:
        return cast(ShownNode, self._post(f"/api/admin/nodes/{quote(node, safe='')}/undrain"))

    def retire_node(self, node: str) -> ShownNode:
        return cast(ShownNode, self._post(f"/api/admin/nodes/{quote(node, safe='')}/retire"))

    def throughput(self, pool: str, minutes: int) -> PoolThroughput:
        query = {"minutes": minutes}
        return cast(PoolThroughput, self._get(f"{_admin_pool(pool)}/throughput", query))

    # ---- the wire ----

    def _get(self, path: str, query: Mapping[str, int] | None = None) -> object:
        return self._call("GET", path, query=query)

    def _post(self, path: str, body: Mapping[str, Any] | None = None) -> object:
        headers = {"Idempotency-Key": str(uuid.uuid4())}
        try:
            return self._call("POST", path, body=body, headers=headers)
        except Unreachable:
            time.sleep(_RETRY_AFTER_S)
            return self._call("POST", path, body=body, headers=headers)

    def _call(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, int] | None = None,
        body: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> object:
        try:
            answer = self._http.request(method, path, params=query, json=body, headers=headers)
        except httpx.TimeoutException:
            raise Unreachable(f"the control plane at {self.url} did not answer in time") from None
        except (httpx.TransportError, httpx.InvalidURL) as error:
            raise Unreachable(f"no control plane answers at {self.url}: {error}") from None
        return _data(answer)


def _pool(pool: str) -> str:
    return f"/api/pools/{quote(pool, safe='')}"


def _admin_pool(pool: str) -> str:
    return f"/api/admin/pools/{quote(pool, safe='')}"


def _data(answer: httpx.Response) -> object:
    """What the envelope holds. Raises Refused, also for an answer that is not ours at all."""
    try:
        envelope = answer.json()
        if envelope["success"]:
            return envelope["data"]
        error = envelope["error"]
        raise Refused(answer.status_code, error["code"], error["message"], error.get("details"))
    except (ValueError, KeyError, TypeError):
        raise Refused(
            answer.status_code,
            f"http_{answer.status_code}",
            f"{answer.url} does not answer like a control plane",
        ) from None
