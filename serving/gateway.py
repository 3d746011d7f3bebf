"""The public door: a pure ASGI middleware around vLLM's application.

For each request it finds the route, the key's pledge and the body, hands vLLM a cleaned request, and
decides what the client gets to see. vLLM answers a stream with 200 before it asks for a place in the
engine, so the response's start is held back until the scheduler has decided, for `HOLD_S` at most;
a refusal after that is a typed error event inside the stream. Everything vLLM says itself about an
error is put into the provider's envelope.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
from collections.abc import Awaitable, Callable, Coroutine, MutableMapping
from typing import Any, TypeVar

from contract.entitlements import PledgeEntitlement, PoolStatus
from scheduler import Refusal
from serving.envelopes import ApiError, Headers, Provider
from serving.metrics import REFUSALS
from serving.node import Node, Verdict, current_verdict
from serving.refusals import api_error, bad_key, pool_not_live
from serving.requests import Kind, Route, clean_body, count_prompts, parse_route, provider_of

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
T = TypeVar("T")
App = Callable[[Scope, Receive, Send], Coroutine[Any, Any, None]]

log = logging.getLogger("boosts.gateway")

HOLD_S = 5.0
"""A stream's headers are held back this long while its request is queued, then keep-alives flow."""
KEEP_ALIVE_S = 10.0
BODY_TIMEOUT_S = 60.0
"""A client has this long to send its body; uvicorn itself sets no limit."""
MAX_ERROR_BYTES = 256 * 1024

_FORWARDED_HEADERS = frozenset({b"host", b"content-type", b"accept", b"user-agent"})
"""The only client headers that vLLM sees: it takes priorities, sessions and ids from others."""


class SeatMiddleware:
    """Turns keys into seats. Loaded by vLLM's `--middleware`; finds its node on the engine client."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008})
        else:
            node: Node = scope["app"].state.engine_client.node
            await Exchange(node, self.app, scope, receive, send).run()


class _AnsweredError(Exception):
    """Ends an exchange whose answer is this error."""

    def __init__(self, error: ApiError) -> None:
        self.error = error


class _ClientLeftError(Exception):
    """Ends an exchange that nobody listens to any more."""


class Exchange:
    """One HTTP request and its answer."""

    def __init__(self, node: Node, app: App, scope: Scope, receive: Receive, send: Send) -> None:
        self.node = node
        self.app = app
        self.scope = scope
        self.receive = receive
        self.send = send
        self.request_id = f"req_{secrets.token_hex(12)}"
        self.provider: Provider = provider_of(scope["path"])
        self.pledge: PledgeEntitlement | None = None
        self.started = False
        """Whether the answer's start has been sent."""

    async def run(self) -> None:
        try:
            await self._answer()
        except _AnsweredError as answered:
            await self._send_error(answered.error)
        except _ClientLeftError:
            pass
        except Exception:
            # The last resort: whatever went wrong, the client reads its provider's envelope.
            log.exception("%s %s failed", self.request_id, self.scope["path"])
            if self.started:
                raise
            await self._send_error(_internal_error())

    async def _answer(self) -> None:
        route = _or_raise(parse_route(self.scope["method"], self.scope["path"]))
        self.provider = route.provider
        self.pledge = self._authenticate()
        if route.kind is Kind.FREE:
            await self._forward(route, b"")
            return
        # Before a byte is read: a key that is over its limit, whose queue is full, or that has more open than
        # could ever run and queue, costs its neighbours no parsing.
        self._raise_refusal(self.node.foresee(self.pledge, queues=route.kind is not Kind.COUNTED))
        with self.node.exchange_open(self.pledge) as refusal:
            self._raise_refusal(refusal)
            content, prompts = await self._read_request()
            if route.kind is Kind.COUNTED:
                self._raise_refusal(self.node.charge_request(self.pledge))
                await self._forward(route, content)
            else:
                await self._generate(route, content, Verdict(self.pledge, prompts))

    async def _read_request(self) -> tuple[bytes, int]:
        """The body as the engine may see it, and how many prompts it holds."""
        body = _or_raise(clean_body(_parse_json(await self._read_body())))
        return json.dumps(body).encode(), count_prompts(body)

    def _authenticate(self) -> PledgeEntitlement:
        """The pledge behind the key, if it may be used now."""
        keyring = self.node.keyring
        pledge = keyring.find(_key_of(self.scope)) if keyring is not None else None
        if pledge is None or keyring is None:
            raise _AnsweredError(bad_key())
        pool = keyring.entitlements.pool
        if pool.status is not PoolStatus.ACTIVE:
            raise _AnsweredError(pool_not_live(pool.slug, pool.status.value))
        self.pledge = pledge
        standing = self.node.standing(pledge)
        self._raise_refusal(None if standing is None else Refusal(standing))
        return pledge

    def _raise_refusal(self, refusal: Refusal | None) -> None:
        if refusal is not None:
            raise _AnsweredError(self._refusal_error(refusal))

    def _refusal_error(self, refusal: Refusal) -> ApiError:
        assert self.pledge is not None
        assert self.node.keyring is not None
        REFUSALS.labels(refusal.reason.value).inc()
        pool = self.node.keyring.entitlements.pool.slug
        return api_error(refusal, self.pledge, pool, self.node.wall_clock())

    # --- towards vLLM ------------------------------------------------------------------------------

    async def _read_body(self) -> bytes:
        chunks: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                while True:
                    message = await self.receive()
                    if message["type"] == "http.disconnect":
                        raise _ClientLeftError
                    chunks.append(message.get("body", b""))
                    size += len(chunks[-1])
                    if size > self.node.max_body_bytes:
                        raise _AnsweredError(_body_too_large(self.node.max_body_bytes))
                    if not message.get("more_body", False):
                        return b"".join(chunks)
        except TimeoutError:
            raise _AnsweredError(_body_too_slow()) from None

    async def _forward(self, route: Route, content: bytes) -> None:
        response = HeldResponse(self)
        await self.app(self._engine_scope(route, content), self._replay(content), response.take)
        await response.finish()

    async def _generate(self, route: Route, content: bytes, verdict: Verdict) -> None:
        """Run vLLM's handler, unless the scheduler refuses meanwhile.

        The handler runs here and not in a task of its own: beside hundreds of streams each turn of the event
        loop takes milliseconds, and a new task is one more turn before the first token.
        """
        response = HeldResponse(self, verdict)
        current_verdict.set(verdict)
        attendant = _Attendant(response, verdict)
        failure: Exception | None = None
        try:
            await self.app(self._engine_scope(route, content), self._replay(content), response.take)
        except asyncio.CancelledError:
            # Ours or `generate`'s, for a refused request; else the server ends the connection.
            if verdict.refusal is None:
                raise
        except Exception as error:
            failure = error
        finally:
            await attendant.leave()
        if verdict.refusal is not None:
            await response.refuse(self._refusal_error(verdict.refusal))
        elif failure is not None:
            log.error("%s: the engine failed", self.request_id, exc_info=failure)
            await response.refuse(_internal_error())
        else:
            await response.finish()

    def _engine_scope(self, route: Route, content: bytes) -> Scope:
        headers = [(name, value) for name, value in self.scope["headers"] if name in _FORWARDED_HEADERS]
        if content:
            headers = [header for header in headers if header[0] != b"content-type"]
            headers += [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(content)).encode()),
            ]
        path = route.engine_path
        return {
            **self.scope,
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": headers,
        }

    def _replay(self, content: bytes) -> Receive:
        """What vLLM receives: the body once, then whatever the connection brings (its end)."""
        pending: list[Message] = [{"type": "http.request", "body": content, "more_body": False}]

        async def receive() -> Message:
            return pending.pop() if pending else await self.receive()

        return receive

    # --- towards the client ------------------------------------------------------------------------

    async def _send_error(self, error: ApiError) -> None:
        body = self.provider.error_body(error, self.request_id)
        headers: Headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            *error.headers(),
            *self.own_headers(),
        ]
        self.started = True
        await self.send({"type": "http.response.start", "status": error.status, "headers": headers})
        await self.send({"type": "http.response.body", "body": body, "more_body": False})

    def own_headers(self) -> Headers:
        """The request's id, and the limits as they stand for a key that was recognised."""
        headers: Headers = [(self.provider.request_id_header, self.request_id.encode())]
        limits = self.node.read_limits(self.pledge) if self.pledge is not None else None
        if limits is not None:
            headers += self.provider.limit_headers(*limits, self.node.wall_clock())
        return headers


class HeldResponse:
    """vLLM's response on its way out, held back until it may be seen.

    Invariants: the start is sent at most once, before any body; after a refusal nothing of vLLM's
    goes out. What is held is bounded: a stream that waits has sent its preamble only, and an error's
    body is cut at MAX_ERROR_BYTES.
    """

    def __init__(self, exchange: Exchange, verdict: Verdict | None = None) -> None:
        self._exchange = exchange
        self._send = exchange.send
        self._verdict = verdict
        self._start: Message | None = None
        self._held: list[bytes] = []
        self._sent = b""
        """What has gone out before the response flowed."""
        self.flowing = False
        """Nothing is held and nothing will be: every message goes straight through."""
        self._ended = False

    def take(self, message: Message) -> Awaitable[None]:
        """vLLM's `send`. Called for every token of a stream, so a flowing one costs no coroutine here."""
        if self.flowing and (self._verdict is None or self._verdict.refusal is None):
            self._ended = not message.get("more_body", False)
            return self._send(message)
        return self._consider(message)

    async def _consider(self, message: Message) -> None:
        verdict = self._verdict
        if verdict is not None and verdict.refusal is not None:
            return
        if message["type"] == "http.response.start":
            self._start = message
        elif self._is_error():
            if sum(map(len, self._held)) < MAX_ERROR_BYTES:
                self._held.append(message.get("body", b""))
        elif verdict is not None and not verdict.dispatched:
            self._held.append(message.get("body", b""))
        else:
            await self._release()
            self.flowing = True
            await self._body(message.get("body", b""), more=message.get("more_body", False))

    async def keep_alive(self) -> None:
        """Let a waiting stream's headers go, and tell its client that the wait goes on."""
        if self._start is not None and not self._is_error() and self._is_stream():
            await self._release()
            await self._body(self._exchange.provider.keep_alive(), more=True)

    async def refuse(self, error: ApiError) -> None:
        """Answer with the refusal: as the whole response, or as the last event of a begun stream."""
        exchange = self._exchange
        if not exchange.started:
            raise _AnsweredError(error)
        if not self._ended:
            event = exchange.provider.stream_error(error, exchange.request_id, self._sent)
            await self._body(event, more=False)

    async def finish(self) -> None:
        """vLLM has said everything: send what is still held."""
        if self._start is None:
            raise _AnsweredError(_internal_error())
        if self._ended:
            return
        if self._is_error():
            raise _AnsweredError(self._engine_error(self._start["status"]))
        await self._release()
        await self._body(b"", more=False)

    def _is_error(self) -> bool:
        return self._start is not None and self._start["status"] >= 400

    def _is_stream(self) -> bool:
        assert self._start is not None
        kinds = [value for name, value in self._start["headers"] if name == b"content-type"]
        return any(kind.startswith(b"text/event-stream") for kind in kinds)

    async def _release(self) -> None:
        if not self._exchange.started:
            assert self._start is not None
            self._exchange.started = True
            headers = [*self._start["headers"], *self._exchange.own_headers()]
            await self._send({**self._start, "headers": headers})
        if self._held:
            held, self._held = b"".join(self._held), []
            self._sent += held
            await self._body(held, more=True)

    async def _body(self, content: bytes, *, more: bool) -> None:
        self._ended = not more
        await self._send({"type": "http.response.body", "body": content, "more_body": more})

    def _engine_error(self, status: int) -> ApiError:
        try:
            body = json.loads(b"".join(self._held))
        except ValueError:
            body = {}
        return self._exchange.provider.engine_error(status, body if isinstance(body, dict) else {})


class _Attendant:
    """Beside vLLM's handler: tells a waiting client that the wait goes on, and ends the handler when the
    scheduler refuses its request. Made in the handler's own task."""

    def __init__(self, response: HeldResponse, verdict: Verdict) -> None:
        handler = asyncio.current_task()
        assert handler is not None
        self._handler = handler
        self._response = response
        self._verdict = verdict
        self._handling = True
        self._cut = False
        self._task = asyncio.create_task(self._attend())

    async def leave(self) -> None:
        """The handler has ended. A keep-alive that is on its way is not cut in the middle."""
        self._handling = False
        self._verdict.over.set()
        await self._task
        if self._cut:
            self._handler.uncancel()

    async def _attend(self) -> None:
        silence_s = HOLD_S
        while not await self._over_within(silence_s):
            if not self._response.flowing:
                await self._response.keep_alive()
                silence_s = KEEP_ALIVE_S
        if self._handling:
            self._cut = self._handler.cancel()

    async def _over_within(self, seconds: float) -> bool:
        try:
            async with asyncio.timeout(None if self._response.flowing else seconds):
                return await self._verdict.over.wait()
        except TimeoutError:
            return False


def _or_raise(value: T | ApiError) -> T:
    if isinstance(value, ApiError):
        raise _AnsweredError(value)
    return value


def _key_of(scope: Scope) -> str:
    """The key in `Authorization: Bearer` or `x-api-key`, as both SDKs send it; "" without."""
    headers = dict(scope["headers"])
    scheme, _, token = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
    if scheme.lower() == "bearer" and token:
        return str(token.strip())
    return str(headers.get(b"x-api-key", b"").decode("latin-1").strip())


def _parse_json(content: bytes) -> object:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise _AnsweredError(
            ApiError(400, None, f"We could not parse the JSON body of your request: {error}")
        ) from None


def _internal_error() -> ApiError:
    return ApiError(500, "engine_error", "The engine could not answer this request.", type="server_error")


def _body_too_large(limit: int) -> ApiError:
    return ApiError(413, "request_too_large", f"The request body exceeds {limit // 2**20} MiB.")


def _body_too_slow() -> ApiError:
    return ApiError(408, "request_timeout", f"The request body did not arrive within {BODY_TIMEOUT_S:.0f} s.")
