"""The gateway around a stand-in for vLLM's application, for the moments a real engine does not offer on
demand: a stream that waits, a preamble before admission, an engine that fails halfway."""

from __future__ import annotations

import asyncio
import datetime
import json
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest

from contract.blocks import Block
from contract.entitlements import (
    BlockTime,
    Entitlements,
    PledgeEntitlement,
    PledgeStatus,
    PoolStatus,
    PoolTerms,
)
from contract.keys import KeyKind, key_sha256, new_key
from scheduler import Ask, Capacity, Policy, Reason, Refusal
from serving import gateway
from serving.gateway import Message, Receive, Scope, SeatMiddleware, Send
from serving.node import Node, RefusedError, Verdict, current_verdict

KEY = new_key(KeyKind.BOOST)
STREAM = [(b"content-type", b"text/event-stream; charset=utf-8")]
PATHS = ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/anthropic/v1/messages"]

Engine = Callable[[Scope, Receive, Send], Awaitable[None]]


def make_node(**policy: Any) -> Node:
    pledge = PledgeEntitlement(
        pledge_id="a",
        key_sha256=key_sha256(KEY),
        status=PledgeStatus.ACTIVE,
        quantity=1,
        rpm_limit=1000,
        tpm_limit=1_000_000,
        blocks=tuple(BlockTime.of(block) for block in Block),
        valid_until=datetime.datetime(2100, 1, 1, tzinfo=datetime.UTC),
    )
    pool = PoolTerms(slug="p", status=PoolStatus.ACTIVE, guarantee_tok_s=5.0, prefill_tok_s=1000.0)
    node = Node(Capacity(1, 100_000), Policy(**policy))
    node.apply(Entitlements(version=1, store_id="s", revision=1, pool=pool, pledges=(pledge,)))
    return node


class Exchanged:
    """One request to a gateway, and what came back."""

    def __init__(
        self, node: Node, engine: Engine, path: str = PATHS[0], body: bytes = b'{"model": "m"}'
    ) -> None:
        app = SimpleNamespace(state=SimpleNamespace(engine_client=SimpleNamespace(node=node)))
        headers = [(b"authorization", b"Bearer " + KEY.encode()), (b"x-vllm-priority", b"9")]
        scope = {"type": "http", "method": "POST", "path": path, "headers": headers, "app": app}
        self.left = asyncio.Event()
        self.sent: list[Message] = []
        self._incoming: list[Message] = [{"type": "http.request", "body": body}]
        self.task = asyncio.create_task(SeatMiddleware(engine)(scope, self._receive, self._send))  # type: ignore[arg-type]

    async def _receive(self) -> Message:
        if self._incoming:
            return self._incoming.pop()
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        self.sent.append(message)

    @property
    def status(self) -> int:
        assert [message["type"] for message in self.sent].count("http.response.start") == 1
        status: int = self.sent[0]["status"]
        return status

    @property
    def body(self) -> bytes:
        assert [message.get("more_body", False) for message in self.sent[1:]][-1] is False
        return b"".join(message["body"] for message in self.sent[1:])


async def streaming(scope: Scope, receive: Receive, send: Send) -> None:
    """What vLLM's streaming handlers do: 200 and a preamble first, then ask for a place, then tokens."""
    node: Node = scope["app"].state.engine_client.node
    verdict = current_verdict.get()
    await send({"type": "http.response.start", "status": 200, "headers": STREAM})
    await send({"type": "http.response.body", "body": b"data: created\n\n", "more_body": True})
    try:
        async with node.enter(verdict, Ask(5, 5)):
            await send({"type": "http.response.body", "body": b"data: tokens\n\n", "more_body": True})
    except RefusedError:
        raise asyncio.CancelledError from None
    await send({"type": "http.response.body", "body": b"", "more_body": False})


@pytest.fixture
async def node() -> Node:
    return make_node(queue_timeout_s=0.3)


@pytest.mark.parametrize("path", PATHS)
async def test_preamble_waits_for_the_decision_and_order_is_kept(node: Node, path: str) -> None:
    exchanged = Exchanged(node, streaming, path)
    await exchanged.task
    assert exchanged.status == 200
    assert exchanged.body == b"data: created\n\ndata: tokens\n\n"


@pytest.mark.parametrize("path", PATHS)
async def test_refusal_while_held_is_a_plain_error_and_hides_the_preamble(node: Node, path: str) -> None:
    async with _slot_taken(node):
        exchanged = Exchanged(node, streaming, path)
        ticking = asyncio.create_task(node.run())
        await asyncio.wait_for(exchanged.task, 5)
        ticking.cancel()
    assert exchanged.status == 503
    assert b"created" not in exchanged.body
    assert "error" in json.loads(exchanged.body)


@pytest.mark.parametrize("path", PATHS)
async def test_after_the_hold_a_stream_is_kept_alive_and_refused_inside(
    node: Node, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway, "HOLD_S", 0.05)
    monkeypatch.setattr(gateway, "KEEP_ALIVE_S", 0.05)
    async with _slot_taken(node):
        exchanged = Exchanged(node, streaming, path)
        ticking = asyncio.create_task(node.run())
        await asyncio.wait_for(exchanged.task, 5)
        ticking.cancel()
    assert exchanged.status == 200
    events = exchanged.body.decode().split("\n\n")
    assert events[0] == "data: created"
    waits = [event for event in events if "waiting" in event or "ping" in event]
    assert len(waits) >= 2
    assert "queue" in exchanged.body.decode()


async def test_waiting_stream_flows_once_admitted(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway, "HOLD_S", 0.02)
    async with _slot_taken(node):
        exchanged = Exchanged(node, streaming)
        await asyncio.sleep(0.1)
        assert exchanged.status == 200
    await exchanged.task
    assert exchanged.body.endswith(b"data: tokens\n\n")


async def test_engine_error_gets_the_envelope(node: Node) -> None:
    async def failing(scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 400, "headers": headers})
        body = (
            b'{"error": {"message": "too long", "type": "BadRequestError", "param": "prompt", "code": 400}}'
        )
        await send({"type": "http.response.body", "body": body, "more_body": False})

    exchanged = Exchanged(node, failing)
    await exchanged.task
    assert exchanged.status == 400
    error = json.loads(exchanged.body)["error"]
    assert error == {
        "message": "too long",
        "type": "invalid_request_error",
        "param": "prompt",
        "code": None,
    }


async def test_engine_that_raises_before_an_answer_is_a_500_with_an_envelope(node: Node) -> None:
    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        raise RuntimeError("boom")

    exchanged = Exchanged(node, broken)
    await asyncio.wait([exchanged.task])
    assert exchanged.status == 500
    assert json.loads(exchanged.body)["error"]["type"] == "server_error"


async def test_engine_that_raises_amid_a_stream_ends_it_with_an_error(node: Node) -> None:
    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        verdict = current_verdict.get()
        await send({"type": "http.response.start", "status": 200, "headers": STREAM})
        async with node.enter(verdict, Ask(5, 5)):
            await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})
            raise RuntimeError("boom")

    exchanged = Exchanged(node, broken)
    await asyncio.wait([exchanged.task])
    assert exchanged.status == 200
    last = exchanged.body.decode().split("data: ")[2]
    assert json.loads(last)["error"]["code"] == "engine_error"
    assert node.admission.in_flight == 0


async def test_a_handler_that_does_not_notice_the_refusal_is_ended(node: Node) -> None:
    ended = asyncio.Event()

    async def deaf(scope: Scope, receive: Receive, send: Send) -> None:
        verdict = current_verdict.get()
        asyncio.get_running_loop().call_later(0.05, verdict.refuse, Refusal(Reason.QUEUE_TIMEOUT, 1.0))
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    exchanged = Exchanged(node, deaf)
    await asyncio.wait_for(exchanged.task, 5)
    assert ended.is_set()
    assert exchanged.status == 503
    assert exchanged.task.cancelling() == 0


async def test_an_exchange_that_the_server_ends_leaves_nothing_behind(node: Node) -> None:
    before = asyncio.all_tasks()
    async with _slot_taken(node):
        exchanged = Exchanged(node, streaming)
        await asyncio.sleep(0.05)
        assert node.admission.queued() == 1
        exchanged.task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await exchanged.task
    assert node.admission.queued() == 0
    assert asyncio.all_tasks() <= before


async def test_a_keep_alive_on_its_way_is_not_cut(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that reads slowly holds up what is sent to it; the answer's start must not get lost."""
    monkeypatch.setattr(gateway, "HOLD_S", 0.02)
    reads = asyncio.Event()

    class SlowClient(Exchanged):
        async def _send(self, message: Message) -> None:
            await reads.wait()
            await super()._send(message)

    async def without_tokens(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": STREAM})
        await asyncio.sleep(0.1)

    exchanged = SlowClient(node, without_tokens)
    await asyncio.sleep(0.2)
    reads.set()
    await asyncio.wait_for(exchanged.task, 5)
    assert exchanged.status == 200
    assert exchanged.body.startswith(b": waiting")


async def test_slow_prefill_is_kept_alive_too(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway, "HOLD_S", 0.05)

    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": STREAM})
        async with node.enter(current_verdict.get(), Ask(5, 5)):
            await asyncio.sleep(0.2)
            await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": False})

    exchanged = Exchanged(node, slow)
    await exchanged.task
    assert exchanged.body.startswith(b": waiting")
    assert exchanged.body.endswith(b"data: 1\n\n")


async def test_more_open_exchanges_than_could_run_and_queue_are_refused(node: Node) -> None:
    bound = node.admission.policy.max_queued_per_seat + 1
    sending = [Exchanged(node, streaming) for _ in range(bound)]
    for exchanged in sending:
        exchanged._incoming[0]["more_body"] = True
    await asyncio.sleep(0.05)
    late = Exchanged(node, streaming)
    await late.task
    assert late.status == 503
    for exchanged in sending:
        exchanged.left.set()
    await asyncio.gather(*(exchanged.task for exchanged in sending))
    after = Exchanged(node, streaming)
    await after.task
    assert after.status == 200


async def test_unforeseen_failure_is_a_500_in_the_envelope(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(body: object) -> None:
        raise KeyError("bug")

    monkeypatch.setattr(gateway, "clean_body", broken)
    exchanged = Exchanged(node, streaming)
    await exchanged.task
    assert exchanged.status == 500
    assert json.loads(exchanged.body)["error"]["type"] == "server_error"


async def test_only_listed_headers_and_the_cleaned_body_reach_the_engine(node: Node) -> None:
    seen: dict[str, Any] = {}

    async def recording(scope: Scope, receive: Receive, send: Send) -> None:
        seen["headers"] = dict(scope["headers"])
        seen["body"] = json.loads((await receive())["body"])
        await streaming(scope, receive, send)

    body = b'{"model": "m", "priority": 0, "priority": 9, "cache_salt": "x"}'
    await Exchanged(node, recording, body=body).task
    assert seen["body"] == {"model": "m"}
    assert set(seen["headers"]) == {b"content-type", b"content-length"}


async def test_client_that_leaves_while_sending_gets_no_answer(node: Node) -> None:
    exchanged = Exchanged(node, streaming)
    exchanged._incoming[0]["more_body"] = True
    exchanged.left.set()
    await exchanged.task
    assert exchanged.sent == []


async def test_body_over_the_limit_is_413(node: Node) -> None:
    exchanged = Exchanged(node, streaming, body=b" " * (2**20 + 1))
    await exchanged.task
    assert exchanged.status == 413
    assert "1 MiB" in json.loads(exchanged.body)["error"]["message"]


async def test_body_that_does_not_arrive_is_408(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway, "BODY_TIMEOUT_S", 0.05)
    exchanged = Exchanged(node, streaming)
    exchanged._incoming[0]["more_body"] = True
    await asyncio.wait_for(exchanged.task, 5)
    assert exchanged.status == 408


class _slot_taken:  # noqa: N801 - reads as the context it makes
    """The node's only slot, used by somebody."""

    def __init__(self, node: Node) -> None:
        assert node.keyring is not None
        verdict = Verdict(node.keyring.pledges["a"])
        self._entered = node.enter(verdict, Ask(1, 1))

    async def __aenter__(self) -> None:
        await self._entered.__aenter__()

    async def __aexit__(self, *error: Any) -> None:
        await self._entered.__aexit__(None, None, None)
