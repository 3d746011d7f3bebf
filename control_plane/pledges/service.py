"""Reserving seats, and what their owner may do with a pledge."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from sqlalchemy import exists, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from contract.blocks import Block
from control_plane.accounts.tables import Account
from control_plane.billing.gateway import GatewayUnavailable
from control_plane.billing.tables import Charge, ChargeState, PaymentMethod, Purpose
from control_plane.capacity import service as capacity
from control_plane.context import ControlPlane
from control_plane.database import new_id
from control_plane.envelope import ApiError
from control_plane.pledges import transitions
from control_plane.pledges.settlement import new_charge, pending_charge, settle
from control_plane.pledges.tables import OPEN_STATES, SHOWN_STATES, SUBSCRIBED_STATES, Pledge, PledgeState
from control_plane.pools import service as pools
from control_plane.pools.tables import Pool, PoolBlock, PoolState, Reservation, Seat


@dataclass(frozen=True, slots=True)
class Order:
    """What a customer asks for: `quantity` seats in each of `blocks`."""

    blocks: tuple[Block, ...]
    quantity: int


async def subscribe(context: ControlPlane, account: Account, id_or_slug: str, order: Order) -> Pledge:
    """Hold the seats, charge the card, confirm or release. Raises ApiError.

    Nothing is held while the gateway is asked but the seats themselves; whatever cuts this off, the
    lifecycle finishes it (`control_plane.pledges.lifecycle`).
    """
    try:
        async with context.database.write() as session:
            pool = await pools.find(session, id_or_slug)
            pool = await pools.lock(session, pool.id)
            pledge = await _hold(session, context, pool, account, order)
    except IntegrityError:
        raise _pledge_exists() from None
    await _settle_all(context, pledge.id)
    async with context.database.read() as session:
        pledge = await session.get_one(Pledge, pledge.id)
        if pledge.state is PledgeState.CANCELED and pledge.ended_because != "card_declined":
            raise ApiError(
                409,
                "pledge_ended",
                "Your reservation ended while it was being made "
                f"({(pledge.ended_because or '').replace('_', ' ')}); subscribe again.",
            )
        if pledge.state is PledgeState.CANCELED:
            code = await session.scalar(
                select(Charge.decline_code).where(
                    Charge.pledge_id == pledge.id, Charge.state == ChargeState.DECLINED
                )
            )
            raise ApiError(
                402,
                "card_declined",
                f"Your card was declined ({code}). The seats are free again; put another card on file "
                "and subscribe again.",
                {"declineCode": code},
            )
    return pledge


async def _hold(
    session: AsyncSession, context: ControlPlane, pool: Pool, account: Account, order: Order
) -> Pledge:
    _require_selling(pool)
    pledge = await _open_pledge(session, account.id, pool.id)
    if pledge is not None:
        raise _payment_pending() if pledge.state is PledgeState.HELD else _pledge_exists()
    if await session.get(PaymentMethod, account.id) is None:
        raise ApiError(
            402,
            "payment_method_required",
            "There is no card on file; add one with POST /api/billing/payment-method.",
        )
    offers = {row.block: row for row in await pools.blocks_of(session, pool.id)}
    _require_offered(offers.keys(), order.blocks)
    now = context.clock()
    if pool.state is PoolState.ACTIVE:
        await capacity.require_room(session, pool, (order.quantity, frozenset(order.blocks)), now)
    seats = await _pick_seats(session, pool, order)
    pledge = Pledge(
        id=new_id(),
        account_id=account.id,
        pool_id=pool.id,
        state=PledgeState.HELD,
        blocks=[block.value for block in order.blocks],
        quantity=order.quantity,
        price_cents=order.quantity * sum(offers[block].price_cents for block in order.blocks),
        created_at=now,
    )
    session.add(pledge)
    await session.flush()
    session.add_all(Reservation(seat_id=seat.id, pledge_id=pledge.id) for seat in seats)
    session.add(new_charge(pledge, Purpose.RESERVATION, now))
    return pledge


async def _pick_seats(session: AsyncSession, pool: Pool, order: Order) -> list[Seat]:
    """All seats of the order, or none. Raises ApiError 409."""
    picked: list[Seat] = []
    short = []
    for block in order.blocks:
        free = await pools.free_seats(session, pool.id, block, order.quantity)
        if len(free) < order.quantity:
            short.append({"block": block.value, "requested": order.quantity, "available": len(free)})
        picked += free
    if short:
        named = ", ".join(f"{entry['block']} ({entry['available']} left)" for entry in short)
        raise ApiError(
            409,
            "sold_out",
            f"Not enough free seats in: {named}. Nothing was reserved.",
            {"blocks": short},
        )
    return picked


async def _settle_all(context: ControlPlane, pledge_id: str) -> None:
    """Settle the fee and, in a live pool, the first month. Raises ApiError 503."""
    try:
        while True:
            async with context.database.read() as session:
                charge_id = await pending_charge(session, pledge_id)
            if charge_id is None:
                return
            await settle(context, charge_id)
    except GatewayUnavailable:
        raise ApiError(
            503,
            "payment_unavailable",
            "The payment provider does not answer. Your seats are held and the charge is tried again for "
            "some minutes: look at my-pledge, or give them up with DELETE.",
            headers={"retry-after": "60"},
        ) from None


async def find_shown(session: AsyncSession, account: Account, pool: Pool) -> Pledge:
    """The account's pledge in the pool. Raises ApiError 404, also for a pledge that has ended."""
    pledge = await _open_pledge(session, account.id, pool.id)
    if pledge is None or pledge.state not in SHOWN_STATES:
        raise _no_pledge()
    return pledge


async def withdraw(context: ControlPlane, account: Account, id_or_slug: str) -> None:
    """Cancel a pledge that is not active yet, or whose fee is still being charged. Raises ApiError."""
    async with context.database.write() as session:
        pool = await pools.find(session, id_or_slug)
        pool = await pools.lock(session, pool.id)
        pledge = await _open_pledge(session, account.id, pool.id)
        if pledge is None:
            raise _no_pledge()
        if pledge.state in SUBSCRIBED_STATES:
            portal = f"{context.public_url}/api/billing/portal"
            raise ApiError(
                409,
                "use_billing_portal",
                f"This subscription is running; cancel it in the billing portal: {portal}",
                {"portalUrl": portal},
            )
        if pledge.state is PledgeState.PLEDGED and await _is_being_charged(session, pledge):
            raise _activating()
        if pledge.state is PledgeState.HELD:
            await transitions.give_fee_back(session, pledge)
        await transitions.cancel(session, pool, pledge, "withdrawn", context.clock())


async def _is_being_charged(session: AsyncSession, pledge: Pledge) -> bool:
    charge = select(Charge.id).where(
        Charge.pledge_id == pledge.id,
        Charge.purpose == Purpose.FIRST_MONTH,
        Charge.state.in_((ChargeState.PENDING, ChargeState.PAID)),
    )
    return bool(await session.scalar(select(exists(charge))))


async def seats_of(session: AsyncSession, pledge: Pledge) -> list[tuple[Seat, int]]:
    """The pledge's seats, each with its block's price in cents, in the day's order."""
    rows = await session.execute(
        select(Seat, PoolBlock.price_cents)
        .join(Reservation, Reservation.seat_id == Seat.id)
        .join(PoolBlock, (PoolBlock.pool_id == Seat.pool_id) & (PoolBlock.block == Seat.block))
        .where(Reservation.pledge_id == pledge.id, Reservation.released_at.is_(None))
    )
    return sorted(
        ((seat, price) for seat, price in rows), key=lambda row: (row[0].block.first_hour, row[0].slot_index)
    )


async def _open_pledge(session: AsyncSession, account_id: str, pool_id: str) -> Pledge | None:
    pledge: Pledge | None = await session.scalar(
        select(Pledge).where(
            Pledge.account_id == account_id, Pledge.pool_id == pool_id, Pledge.state.in_(OPEN_STATES)
        )
    )
    return pledge


def _require_selling(pool: Pool) -> None:
    if pool.state is PoolState.PAUSED:
        raise ApiError(409, "pool_paused", "This pool is paused; it sells nothing until it is resumed.")


def _activating() -> ApiError:
    return ApiError(
        409,
        "pool_activating",
        "This pool is going live and your first month is being charged; look at my-pledge in a minute.",
        headers={"retry-after": "30"},
    )


def _no_pledge() -> ApiError:
    return ApiError(404, "pledge_not_found", "You have no pledge in this pool.")


def _payment_pending() -> ApiError:
    return ApiError(
        409,
        "payment_pending",
        "Your seats are held while your card is being charged; look at my-pledge in a minute, or give "
        "them up with DELETE.",
        headers={"retry-after": "60"},
    )


def _pledge_exists() -> ApiError:
    return ApiError(409, "pledge_exists", "You have a pledge in this pool already: there is one per account.")


def _require_offered(offered: Collection[Block], wanted: Collection[Block]) -> None:
    missing = [block.value for block in wanted if block not in offered]
    if missing:
        named = ", ".join(block.value for block in offered)
        message = f"This pool has no {' or '.join(missing)} block; it has {named}."
        raise ApiError(422, "block_not_offered", message)
