"""Cards on file and subscriptions, as their owner manages them."""

from __future__ import annotations

from sqlalchemy import select, update

from control_plane.accounts.tables import Account
from control_plane.billing.gateway import Card, GatewayUnavailable, UnknownPaymentMethod
from control_plane.billing.tables import Charge, PaymentMethod
from control_plane.context import ControlPlane
from control_plane.envelope import ApiError
from control_plane.pledges import transitions
from control_plane.pledges.tables import SHOWN_STATES, SUBSCRIBED_STATES, Pledge, PledgeState
from control_plane.pools import service as pools
from control_plane.pools.tables import Pool

_SHOWN_CHARGES = 500


async def put_on_file(context: ControlPlane, account: Account, token: str) -> Card:
    """Make this the account's card; what is past due is tried with it at once. Raises ApiError."""
    try:
        card = await context.gateway.attach(token)
    except UnknownPaymentMethod as error:
        raise ApiError(422, "unknown_payment_method", str(error)) from None
    except GatewayUnavailable:
        raise ApiError(
            503,
            "payment_unavailable",
            "The payment provider does not answer; nothing was changed. Try again in a minute.",
            headers={"retry-after": "60"},
        ) from None
    now = context.clock()
    async with context.database.write() as session:
        # One card at a time.
        await session.get_one(Account, account.id, with_for_update=True)
        await session.merge(
            PaymentMethod(
                account_id=account.id, token=token, brand=card.brand, last4=card.last4, updated_at=now
            )
        )
        await session.execute(
            update(Pledge)
            .where(Pledge.account_id == account.id, Pledge.state == PledgeState.PAST_DUE)
            .values(retry_now=True)
        )
    return card


async def subscriptions(context: ControlPlane, account: Account) -> list[tuple[Pledge, Pool]]:
    """The account's pledges that have not ended, oldest first."""
    async with context.database.read() as session:
        rows = await session.execute(
            select(Pledge, Pool)
            .join(Pool, Pool.id == Pledge.pool_id)
            .where(Pledge.account_id == account.id, Pledge.state.in_(SHOWN_STATES))
            .order_by(Pledge.created_at)
        )
        return [(pledge, pool) for pledge, pool in rows]


async def charges(context: ControlPlane, account: Account) -> list[tuple[Charge, Pool]]:
    """The account's charges, newest first; the last few hundred."""
    async with context.database.read() as session:
        rows = await session.execute(
            select(Charge, Pool)
            .join(Pledge, Pledge.id == Charge.pledge_id)
            .join(Pool, Pool.id == Pledge.pool_id)
            .where(Pledge.account_id == account.id)
            .order_by(Charge.created_at.desc(), Charge.id)
            .limit(_SHOWN_CHARGES)
        )
        return [(charge, pool) for charge, pool in rows]


async def end_subscription(
    context: ControlPlane, account: Account, pledge_id: str, *, at_period_end: bool
) -> tuple[Pledge, Pool]:
    """Let a subscription end with its paid period, or take that back. What is not paid for ends at once.

    Raises ApiError.
    """
    async with context.database.write() as session:
        pool_id = await session.scalar(
            select(Pledge.pool_id).where(Pledge.id == pledge_id, Pledge.account_id == account.id)
        )
        if pool_id is None:
            raise _not_found()
        pool = await pools.lock(session, pool_id)
        pledge = await session.get_one(Pledge, pledge_id)
        if pledge.state not in SUBSCRIBED_STATES:
            raise _not_found()
        pledge.cancel_at_period_end = at_period_end
        now = context.clock()
        assert pledge.current_period_end is not None
        # What is paid for does not run out while the pool is paused.
        if at_period_end and pledge.current_period_end <= (pool.paused_at or now):
            await transitions.cancel(session, pool, pledge, "subscription_ended", now)
        return pledge, pool


def _not_found() -> ApiError:
    return ApiError(404, "pledge_not_found", "You have no running subscription with this id.")
