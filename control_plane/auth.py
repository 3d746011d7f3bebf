"""Who is calling: dependencies for routes that turn a bearer key into an account or a node."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from sqlalchemy import select

from contract.keys import KeyKind, is_key, key_sha256
from control_plane.accounts.tables import Account, ManagementKey, Role
from control_plane.context import Context, ControlPlane
from control_plane.envelope import ApiError
from control_plane.nodes.tables import Node

bearer = HTTPBearer(auto_error=False, description="A key")
Credentials = Annotated[HTTPAuthorizationCredentials | None, Security(bearer)]


def _bearer(credentials: HTTPAuthorizationCredentials | None, kind: KeyKind, what: str) -> str:
    """The hash of the key. Raises ApiError 401."""
    if credentials is None:
        raise _unauthorized(f"Send your {what} as `Authorization: Bearer {kind.value}...`.")
    if not is_key(credentials.credentials, kind):
        raise _unauthorized(f"This is not a {what} ({kind.value}...), or it is mistyped.")
    return key_sha256(credentials.credentials)


def _unauthorized(message: str) -> ApiError:
    return ApiError(401, "unauthorized", message, headers={"www-authenticate": "Bearer"})


async def account_of(context: ControlPlane, credentials: HTTPAuthorizationCredentials | None) -> Account:
    """The account whose management key was sent. Raises ApiError 401."""
    key = _bearer(credentials, KeyKind.MANAGEMENT, "management key")
    async with context.database.read() as session:
        account = await session.scalar(
            select(Account).join(ManagementKey).where(ManagementKey.key_sha256 == key)
        )
    if account is None:
        raise _unauthorized("This management key is unknown or was withdrawn.")
    return account


async def _caller(context: Context, credentials: Credentials) -> Account:
    return await account_of(context, credentials)


Caller = Annotated[Account, Depends(_caller)]
"""For routes: the account whose management key was sent; 401 without one."""


async def _operator(caller: Caller) -> Account:
    if caller.role is not Role.OPERATOR:
        raise ApiError(403, "operator_required", "Only an operator's management key opens this address.")
    return caller


Operator = Annotated[Account, Depends(_operator)]
"""For routes: the same, and it is an operator; else 403."""


async def _node(context: Context, credentials: Credentials) -> Node:
    key = _bearer(credentials, KeyKind.NODE, "node token")
    async with context.database.read() as session:
        node = await session.scalar(select(Node).where(Node.token_sha256 == key, ~Node.retired))
    if node is None:
        raise _unauthorized(
            "This node token is unknown, or its node was retired; join again with a new join token."
        )
    return node


CallingNode = Annotated[Node, Depends(_node)]
"""For routes: the node whose token was sent; 401 without one."""
