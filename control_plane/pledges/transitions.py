"""What happens to a pledge, one change each. All of them hold the pool's row (`pools.service.lock`).

```
            fee paid                    pool goes live, month paid
   held ───────────────► pledged ──────────────────────────────────► active ◄──┐
    │  └────────────────────┼───── fee and month paid, pool is live ──►│       │ paid
    │ declined, expired     │ withdrawn, declined                      ▼       │
    └───────► canceled ◄────┴────────────── ended, unpaid ────────── past_due ─┘
```
"""

from __future__ import annotations

import datetime

from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import AsyncSession

from control_plane.accounts.tables import Account
from control_plane.billing.tables import Charge, ChargeState, PaymentMethod, Purpose
from control_plane.clock import add_months
from control_plane.keys import service as keys
from control_plane.nodes.orders import HONOURED_AFTER_PERIOD
from control_plane.nodes.service import choose_node
from control_plane.pledges.tables import SUBSCRIBED_STATES, Pledge, PledgeState
from control_plane.pools.service import release_seats, touch
from control_plane.pools.tables import Pool
from control_plane.vault import Vault

RETRY_AFTER = (datetime.timedelta(days=1), datetime.timedelta(days=3), datetime.timedelta(days=5))
"""When a declined renewal is tried again, counted from each decline; after the last the pledge ends."""


async def activate(
    session: AsyncSession, vault: Vault, pool: Pool, pledge: Pledge, now: datetime.datetime
) -> None:
    """Its first month is paid: the pledge gets its key, its node and its first period."""
    pledge.state = PledgeState.ACTIVE
    pledge.activated_at = pledge.billing_anchor = now
    pledge.periods = 1
    pledge.current_period_end = add_months(now, 1)
    await keys.ensure(session, vault, pledge.id, now)
    await place(session, pool, pledge, now)
    touch(pool)


async def place(session: AsyncSession, pool: Pool, pledge: Pledge, now: datetime.datetime) -> None:
    """Give the pledge a node, if there is one."""
    node = await choose_node(session, pool, pledge.reserved_blocks, now, pledge.quantity)
    pledge.node_id = None if node is None else node.id
    # Seen by the next choice in this transaction.
    await session.flush()


def renew(pool: Pool, pledge: Pledge, begun: datetime.datetime) -> None:
    """The next month is paid, by a charge `begun` then. It begins where the last one ended, however late it
    was paid; unless it was us who were away, for so long that nodes had stopped honouring the key."""
    assert pledge.billing_anchor is not None, "a subscribed pledge has its anchor"
    assert pledge.current_period_end is not None
    if pledge.state is PledgeState.ACTIVE and begun - pledge.current_period_end > HONOURED_AFTER_PERIOD:
        pledge.billing_anchor, pledge.periods = begun, 0
    pledge.periods += 1
    pledge.current_period_end = add_months(pledge.billing_anchor, pledge.periods)
    pledge.state = PledgeState.ACTIVE
    pledge.failed_renewals = 0
    pledge.retry_now = False
    pledge.next_attempt_at = None
    touch(pool)


async def fail_renewal(
    session: AsyncSession, pool: Pool, pledge: Pledge, charge: Charge, now: datetime.datetime
) -> None:
    """The next month was declined: the key is suspended, and in the end the pledge."""
    # Whoever puts a card on file holds this row: no card comes in between.
    await session.get_one(Account, pledge.account_id, with_for_update=True)
    card = await session.get_one(PaymentMethod, pledge.account_id)
    # While the old card was asked, or its answer was on its way, another one was put on file.
    pledge.retry_now = card.token != charge.token
    if pledge.next_attempt_at is not None and pledge.next_attempt_at > charge.created_at:
        # Tried beside the schedule, for a new card: that must not bring the end nearer.
        return
    pledge.failed_renewals += 1
    if pledge.failed_renewals > len(RETRY_AFTER):
        await cancel(session, pool, pledge, "unpaid", now)
        return
    pledge.state = PledgeState.PAST_DUE
    pledge.next_attempt_at = now + RETRY_AFTER[pledge.failed_renewals - 1]
    touch(pool)


async def cancel(
    session: AsyncSession, pool: Pool, pledge: Pledge, because: str, now: datetime.datetime
) -> None:
    """The pledge ends here; its seats are free."""
    if pledge.state in SUBSCRIBED_STATES:
        touch(pool)
    pledge.state = PledgeState.CANCELED
    pledge.ended_at = now
    pledge.ended_because = because
    pledge.next_attempt_at = None
    await release_seats(session, pledge.id, now)
    # A charge on its way is undone, wherever it got to.
    await session.execute(
        update(Charge)
        .where(Charge.pledge_id == pledge.id, Charge.state == ChargeState.PENDING)
        .values(state=ChargeState.REFUNDING)
    )


async def give_fee_back(session: AsyncSession, pledge: Pledge) -> None:
    """The reservation that the fee was for did not come about."""
    fees = await session.scalars(
        select(Charge).where(
            Charge.pledge_id == pledge.id,
            Charge.purpose == Purpose.RESERVATION,
            Charge.state.in_((ChargeState.PENDING, ChargeState.PAID)),
        )
    )
    for fee in fees:
        fee.state = ChargeState.REFUNDING
