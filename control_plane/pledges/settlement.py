"""Settling a charge: asking the gateway, then carrying out what follows from its answer.

A charge is a row before it is a call, and its id is the call's idempotency key. So settling can be
cut off anywhere and done again by anyone: the gateway gives the same answer, and what follows from it
happens in one transaction with the change of the row's state.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from control_plane.billing.gateway import Outcome
from control_plane.billing.tables import Charge, ChargeState, PaymentMethod, Purpose
from control_plane.context import ControlPlane
from control_plane.pledges import transitions
from control_plane.pledges.tables import SUBSCRIBED_STATES, Pledge, PledgeState
from control_plane.pools import service as pools
from control_plane.pools.tables import Pool, PoolState

RESERVATION_FEE_CENTS = 100
_LIVE = (PoolState.ACTIVE, PoolState.PAUSED)


@dataclass(frozen=True, slots=True)
class _Settled:
    """A charge with its answer, and everything that may change by it; the pool is locked."""

    session: AsyncSession
    context: ControlPlane
    pool: Pool
    pledge: Pledge
    charge: Charge
    now: datetime.datetime


def new_charge(
    pledge: Pledge, purpose: Purpose, now: datetime.datetime, activation: int | None = None
) -> Charge:
    """A charge to be settled: the fee, or the pledge's price."""
    fee = purpose is Purpose.RESERVATION
    return Charge(
        pledge_id=pledge.id,
        purpose=purpose,
        activation=activation,
        amount_cents=RESERVATION_FEE_CENTS if fee else pledge.price_cents,
        state=ChargeState.PENDING,
        created_at=now,
    )


async def settle(context: ControlPlane, charge_id: str) -> None:
    """Bring a pending or refunding charge to its end. Raises GatewayUnavailable."""
    async with context.database.read() as session:
        charge = await session.get_one(Charge, charge_id)
        pledge = await session.get_one(Pledge, charge.pledge_id)
    if charge.state is ChargeState.REFUNDING:
        await context.gateway.refund(charge.id)
        await _mark_refunded(context, charge.id)
    elif charge.state is ChargeState.PENDING:
        description = f"GPU Boosts {charge.purpose.value.replace('_', ' ')}, pledge {pledge.id}"
        token = charge.token or await _take_card(context, charge.id, pledge.account_id)
        outcome = await context.gateway.charge(charge.id, token, charge.amount_cents, description)
        await _follow(context, charge.id, pledge.pool_id, outcome)


async def _take_card(context: ControlPlane, charge_id: str, account_id: str) -> str:
    """The card on file; from here on it is this charge's."""
    async with context.database.write() as session:
        charge = await session.get_one(Charge, charge_id, with_for_update=True)
        if charge.token is None:
            charge.token = (await session.get_one(PaymentMethod, account_id)).token
        return charge.token


async def _mark_refunded(context: ControlPlane, charge_id: str) -> None:
    async with context.database.write() as session:
        charge = await session.get_one(Charge, charge_id, with_for_update=True)
        charge.state = ChargeState.REFUNDED


async def _follow(context: ControlPlane, charge_id: str, pool_id: str, outcome: Outcome) -> None:
    now = context.clock()
    async with context.database.write() as session:
        pool = await pools.lock(session, pool_id)
        charge = await session.get_one(Charge, charge_id)
        if charge.state is not ChargeState.PENDING:
            # Another one settled it first, or it was given up meanwhile and is being refunded.
            return
        charge.state = ChargeState.PAID if outcome.paid else ChargeState.DECLINED
        charge.decline_code = outcome.decline_code
        charge.settled_at = now
        pledge = await session.get_one(Pledge, charge.pledge_id)
        assert pledge.state is not PledgeState.CANCELED, "whoever ends a pledge gives up its charges"
        settled = _Settled(session, context, pool, pledge, charge, now)
        match charge.purpose:
            case Purpose.RESERVATION:
                await (_fee_paid(settled) if outcome.paid else _purchase_failed(settled))
            case Purpose.FIRST_MONTH if pool.state in _LIVE:
                await (_first_month_paid(settled) if outcome.paid else _purchase_failed(settled))
            case Purpose.FIRST_MONTH:
                # The pool is going live: what follows is decided when all its pledges are charged.
                pass
            case Purpose.RENEWAL:
                assert pledge.state in SUBSCRIBED_STATES
                if outcome.paid:
                    transitions.renew(pool, pledge, charge.created_at)
                else:
                    await transitions.fail_renewal(session, pool, pledge, charge, now)


async def _fee_paid(settled: _Settled) -> None:
    if settled.pool.state is PoolState.ACTIVE:
        # Nothing to wait for: the seats stay held until the month is paid too.
        month = new_charge(settled.pledge, Purpose.FIRST_MONTH, settled.now, settled.pool.activation)
        settled.session.add(month)
    else:
        settled.pledge.state = PledgeState.PLEDGED


async def _first_month_paid(settled: _Settled) -> None:
    await transitions.activate(
        settled.session, settled.context.vault, settled.pool, settled.pledge, settled.now
    )


async def _purchase_failed(settled: _Settled) -> None:
    if settled.pledge.state is PledgeState.HELD:
        await transitions.give_fee_back(settled.session, settled.pledge)
    await transitions.cancel(settled.session, settled.pool, settled.pledge, "card_declined", settled.now)


async def pending_charge(session: AsyncSession, pledge_id: str) -> str | None:
    """Id of the pledge's charge that is not settled yet: there is at most one."""
    charge_id: str | None = await session.scalar(
        select(Charge.id).where(Charge.pledge_id == pledge_id, Charge.state == ChargeState.PENDING)
    )
    return charge_id
