"""Routes whose POSTs may be repeated: `Idempotency-Key`, as in the IETF's draft of that header.

The answer of a call that succeeded is kept for a day, encrypted, and given again to the same account
with the same key and the same request. A refusal is not kept: it changed nothing, and its cause may
be mended by then.
"""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from sqlalchemy import delete
from sqlalchemy.exc import IntegrityError

from control_plane.accounts.tables import IdempotentCall
from control_plane.auth import account_of, bearer
from control_plane.context import ControlPlane
from control_plane.envelope import ApiError, documented

KEPT = datetime.timedelta(hours=24)
_MAX_KEY = 255
_PARAMETER = {
    "name": "Idempotency-Key",
    "in": "header",
    "required": False,
    "schema": {"type": "string", "minLength": 1, "maxLength": _MAX_KEY},
    "description": "Of your choice: repeated with it, the call takes effect once.",
}
_ABANDONED = datetime.timedelta(seconds=60)
"""A call that has run this long has died with its process, and may be made again."""


class IdempotentRoute(APIRoute):
    """A route that honours `Idempotency-Key` on POST."""

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        if "POST" in (options.get("methods") or ()):
            options["responses"] = {**documented(409), **(options.get("responses") or {})}
            options["openapi_extra"] = {"parameters": [_PARAMETER]}
        super().__init__(path, endpoint, **options)

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_once(request: Request) -> Response:
            key = request.headers.get("idempotency-key")
            if key is None or request.method != "POST":
                return await handle(request)
            if not 0 < len(key) <= _MAX_KEY or not key.isprintable():
                raise ApiError(
                    422, "invalid_request", f"Idempotency-Key must be 1 to {_MAX_KEY} printable characters."
                )
            context: ControlPlane = request.app.state.control_plane
            # Nothing is kept for a stranger.
            account = await account_of(context, await bearer(request))
            call = _Call(context, account.id, key, await _fingerprint(request))
            kept = await call.begin()
            if kept is not None:
                return kept
            try:
                response = await handle(request)
            except BaseException:
                await call.forget()
                raise
            await call.keep(response)
            return response

        return handle_once


async def _fingerprint(request: Request) -> str:
    described = f"{request.method} {request.url.path}\n".encode() + await request.body()
    return hashlib.sha256(described).hexdigest()


class _Call:
    """One call with its key: begun, then kept or forgotten."""

    def __init__(self, context: ControlPlane, account_id: str, key: str, fingerprint: str) -> None:
        self._context = context
        self._id = (account_id, key)
        self._fingerprint = fingerprint

    async def begin(self) -> Response | None:
        """The kept answer of an earlier call, or None for the caller to go on. Raises ApiError."""
        now = self._context.clock()
        try:
            async with self._context.database.write() as session:
                row = await session.get(IdempotentCall, self._id, with_for_update=True)
                if row is not None and self._expired(row, now):
                    await session.delete(row)
                    await session.flush()
                    row = None
                if row is None:
                    session.add(
                        IdempotentCall(
                            account_id=self._id[0],
                            key=self._id[1],
                            request_sha256=self._fingerprint,
                            started_at=now,
                        )
                    )
                    return None
        except IntegrityError:
            # PostgreSQL lets two begin at once; the index lets one through.
            raise _in_progress() from None
        if row.request_sha256 != self._fingerprint:
            raise ApiError(
                422,
                "idempotency_key_reused",
                "This Idempotency-Key was used for another request; use a fresh one for each.",
            )
        if row.status is None or row.answer is None:
            raise _in_progress()
        return Response(
            self._context.vault.decrypt(row.answer, self._bound_to),
            row.status,
            {"idempotent-replayed": "true"},
            "application/json",
        )

    async def keep(self, response: Response) -> None:
        async with self._context.database.write() as session:
            row = await session.get(IdempotentCall, self._id)
            if row is not None:
                row.status = response.status_code
                row.answer = self._context.vault.encrypt(bytes(response.body), self._bound_to)

    async def forget(self) -> None:
        async with self._context.database.write() as session:
            await session.execute(delete(IdempotentCall).where(*self._is_this()))

    def _expired(self, row: IdempotentCall, now: datetime.datetime) -> bool:
        return row.started_at < now - (_ABANDONED if row.status is None else KEPT)

    def _is_this(self) -> tuple[Any, ...]:
        return IdempotentCall.account_id == self._id[0], IdempotentCall.key == self._id[1]

    @property
    def _bound_to(self) -> str:
        return ":".join(self._id)


def _in_progress() -> ApiError:
    return ApiError(
        409,
        "idempotency_in_progress",
        "The first call with this Idempotency-Key is still running; ask again in a moment.",
        headers={"retry-after": "1"},
    )
