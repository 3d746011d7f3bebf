"""Billing for customers: the card on file, and the portal where running subscriptions are ended."""

from __future__ import annotations

from fastapi import APIRouter

from control_plane.auth import Caller
from control_plane.billing import service
from control_plane.clock import iso
from control_plane.context import Context, ControlPlane
from control_plane.envelope import Shown, Success, documented
from control_plane.money import show
from control_plane.pledges.tables import SUBSCRIBED_STATES, Pledge
from control_plane.pools.tables import Pool
from control_plane.routing import IdempotentRoute
from control_plane.text import Name, Reference

router = APIRouter(prefix="/api/billing", tags=["billing"], route_class=IdempotentRoute)


class NewPaymentMethod(Shown):
    payment_method: Name
    """The provider's name for it, such as `pm_card_visa`. Card numbers never come here."""


class CardOnFile(Shown):
    brand: str
    last4: str


class PoolPledge(Shown):
    """A pledge as billing sees it."""

    id: str
    pool_id: str
    pool_slug: str
    status: str
    monthly_price: str
    current_period_end: str | None
    cancel_at_period_end: bool
    has_key: bool
    cancel_url: str | None
    """POST here to end the subscription with its paid period; null before it is active."""
    resume_url: str | None
    """POST here to take that back."""


class ShownCharge(Shown):
    """One attempt to take money."""

    id: str
    pool_slug: str
    pledge_id: str
    purpose: str
    """reservation, first_month or renewal."""
    amount: str
    status: str
    """pending, paid, declined, refunding or refunded."""
    decline_code: str | None
    created_at: str


class Portal(Shown):
    pool_pledges: list[PoolPledge]


@router.post("/payment-method", responses=documented(401, 503))
async def put_card_on_file(context: Context, caller: Caller, body: NewPaymentMethod) -> Success[CardOnFile]:
    """Put a card on file; it takes the place of the former one."""
    card = await service.put_on_file(context, caller, body.payment_method)
    return Success(data=CardOnFile(brand=card.brand, last4=card.last4))


@router.get("/portal", responses=documented(401))
async def portal(context: Context, caller: Caller) -> Success[Portal]:
    """All pledges of the account that have not ended."""
    found = await service.subscriptions(context, caller)
    return Success(data=Portal(pool_pledges=[_shown(context, pledge, pool) for pledge, pool in found]))


@router.get("/charges", responses=documented(401))
async def charges(context: Context, caller: Caller) -> Success[list[ShownCharge]]:
    """What was charged and given back, newest first; the last 500."""
    return Success(
        data=[
            ShownCharge(
                id=charge.id,
                pool_slug=pool.slug,
                pledge_id=charge.pledge_id,
                purpose=charge.purpose.value,
                amount=show(charge.amount_cents),
                status=charge.state.value,
                decline_code=charge.decline_code,
                created_at=iso(charge.created_at),
            )
            for charge, pool in await service.charges(context, caller)
        ]
    )


@router.post("/pledges/{pledge_id}/cancel", responses=documented(401, 404))
async def cancel(context: Context, caller: Caller, pledge_id: Reference) -> Success[PoolPledge]:
    """End a subscription with its paid period; the key works until then."""
    pledge, pool = await service.end_subscription(context, caller, pledge_id, at_period_end=True)
    return Success(data=_shown(context, pledge, pool))


@router.post("/pledges/{pledge_id}/resume", responses=documented(401, 404))
async def resume(context: Context, caller: Caller, pledge_id: Reference) -> Success[PoolPledge]:
    """Take a cancellation back, before the paid period is over."""
    pledge, pool = await service.end_subscription(context, caller, pledge_id, at_period_end=False)
    return Success(data=_shown(context, pledge, pool))


def _shown(context: ControlPlane, pledge: Pledge, pool: Pool) -> PoolPledge:
    end = pledge.current_period_end
    running = pledge.state in SUBSCRIBED_STATES
    path = f"{context.public_url}/api/billing/pledges/{pledge.id}"
    return PoolPledge(
        id=pledge.id,
        pool_id=pool.id,
        pool_slug=pool.slug,
        status=pledge.state.value,
        monthly_price=show(pledge.price_cents),
        current_period_end=None if end is None else iso(end),
        cancel_at_period_end=pledge.cancel_at_period_end,
        has_key=running,
        cancel_url=f"{path}/cancel" if running else None,
        resume_url=f"{path}/resume" if running else None,
    )
