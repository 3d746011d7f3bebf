"""The operator's side of accounts."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter
from pydantic import AfterValidator, Field
from sqlalchemy import select

from control_plane.accounts import service
from control_plane.accounts.tables import Account, Role
from control_plane.auth import Operator
from control_plane.clock import iso
from control_plane.context import Context
from control_plane.envelope import Shown, Success, documented
from control_plane.routing import IdempotentRoute
from control_plane.text import Name, Reference, Text

router = APIRouter(prefix="/api/admin/accounts", tags=["operator"], route_class=IdempotentRoute)


Email = Annotated[Text, AfterValidator(str.casefold), Field(pattern=r"^[^@\s]+@[^@\s]+$", max_length=320)]
"""In lower case: however it is written, it is one account."""


class NewAccount(Shown):
    name: Name
    email: Email


class CreatedAccount(Shown):
    id: str
    management_key: str
    """Shown this once."""


class ShownAccount(Shown):
    id: str
    name: str
    email: str
    role: str
    created_at: str


@router.post("", responses=documented(401, 403, 409))
async def create_account(context: Context, operator: Operator, body: NewAccount) -> Success[CreatedAccount]:
    """Make a customer's account. Its management key is in this answer and nowhere else."""
    async with context.database.write() as session:
        account, key = await service.create(session, body.name, body.email, Role.CUSTOMER, context.clock())
    return Success(data=CreatedAccount(id=account.id, management_key=key))


@router.post("/{account_id}/management-key", responses=documented(401, 403, 404))
async def replace_management_key(
    context: Context, operator: Operator, account_id: Reference
) -> Success[CreatedAccount]:
    """Withdraw an account's management keys, lost or leaked, and make a new one. Boost keys stay."""
    async with context.database.write() as session:
        key = await service.replace_keys(session, account_id, context.clock())
    return Success(data=CreatedAccount(id=account_id, management_key=key))


@router.get("", responses=documented(401, 403))
async def list_accounts(context: Context, operator: Operator) -> Success[list[ShownAccount]]:
    """All accounts, oldest first."""
    async with context.database.read() as session:
        accounts = await session.scalars(select(Account).order_by(Account.created_at, Account.id))
        return Success(
            data=[
                ShownAccount(
                    id=account.id,
                    name=account.name,
                    email=account.email,
                    role=account.role.value,
                    created_at=iso(account.created_at),
                )
                for account in accounts
            ]
        )
