"""A bound on request bodies, before anything reads them."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from control_plane.envelope import ApiError

MAX_BODY_BYTES = 1 << 20
MAX_INTERNAL_BODY_BYTES = 4 << 20
"""For nodes: one report on the most pledges that a node can have. A query names every pledge of a batch,
and PostgreSQL takes 32,767 names: fewer than that fit into this."""


class BodyLimit:
    """Answers 413 to a body that is longer than its path may have."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limit = MAX_INTERNAL_BODY_BYTES if scope["path"].startswith("/internal/") else MAX_BODY_BYTES
        seen = 0

        async def bounded() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > limit:
                raise ValueError("the body is too large")
            return message

        async def answer(message: Message) -> None:
            # Whatever the application made of the broken body, the caller learns what was wrong with it.
            if seen <= limit:
                await send(message)

        try:
            await self._app(scope, bounded, answer)
        except ValueError:
            if seen <= limit:
                raise
        if seen > limit:
            error = ApiError(413, "request_too_large", f"The body may have {limit} bytes at most.")
            await error.answer()(scope, receive, send)
