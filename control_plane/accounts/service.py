"""Accounts: making them, with a management key that is shown once."""

from __future__ import annotations

import datetime

from sqlalchemy import delete, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from contract.keys import KeyKind, key_sha256, new_key
from control_plane.accounts.tables import Account, ManagementKey, Role
from control_plane.database import new_id
from control_plane.envelope import ApiError


async def create(
    session: AsyncSession, name: str, email: str, role: Role, now: datetime.datetime
) -> tuple[Account, str]:
    """A new account and its management key. Raises ApiError 409 for an email that has one."""
    account = Account(id=new_id(), name=name, email=email, role=role, created_at=now)
    session.add(account)
    try:
        await session.flush()
    except IntegrityError:
        raise ApiError(409, "email_taken", f"There is an account for {email} already.") from None
    return account, add_key(session, account, now)


def add_key(session: AsyncSession, account: Account, now: datetime.datetime) -> str:
    """A further management key of the account."""
    key = new_key(KeyKind.MANAGEMENT)
    session.add(ManagementKey(account_id=account.id, key_sha256=key_sha256(key), created_at=now))
    return key


async def replace_keys(session: AsyncSession, account_id: str, now: datetime.datetime) -> str:
    """Withdraw the account's management keys, and make a new one. Raises ApiError 404."""
    account = await session.get(Account, account_id, with_for_update=True)
    if account is None:
        raise ApiError(404, "account_not_found", "There is no account with this id.")
    await session.execute(delete(ManagementKey).where(ManagementKey.account_id == account.id))
    return add_key(session, account, now)


async def new_operator_key(session: AsyncSession, email: str, now: datetime.datetime) -> str:
    """A management key for the operator with this email, who is made if need be. Raises ApiError 409."""
    email = email.casefold()
    account = await session.scalar(select(Account).where(Account.email == email))
    if account is None:
        return (await create(session, email.partition("@")[0], email, Role.OPERATOR, now))[1]
    if account.role is not Role.OPERATOR:
        raise ApiError(
            409, "email_taken", f"{email} is a customer's account; operators need one of their own."
        )
    return add_key(session, account, now)
