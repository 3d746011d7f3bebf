"""Cards on file, charges, and the embedded gateway's own book."""

from __future__ import annotations

import datetime
import enum

from sqlalchemy import BigInteger, ForeignKey, String
from sqlalchemy.orm import Mapped, mapped_column

from control_plane.database import Table, new_id, stored_enum


class PaymentMethod(Table):
    """The card on file of an account; a new one takes its place."""

    __tablename__ = "payment_methods"

    account_id: Mapped[str] = mapped_column(ForeignKey("accounts.id"), primary_key=True)
    token: Mapped[str] = mapped_column(String(200))
    """The gateway's name for it; card numbers never come here."""
    brand: Mapped[str] = mapped_column(String(30))
    last4: Mapped[str] = mapped_column(String(4))
    updated_at: Mapped[datetime.datetime]


class Purpose(enum.Enum):
    """What a charge is for."""

    RESERVATION = "reservation"
    """The fee that confirms a card; not refunded once the pledge stands."""
    FIRST_MONTH = "first_month"
    RENEWAL = "renewal"


class ChargeState(enum.Enum):
    """pending -> paid | declined; pending or paid -> refunding -> refunded."""

    PENDING = "pending"
    PAID = "paid"
    DECLINED = "declined"
    REFUNDING = "refunding"
    """To be undone at the gateway, whether or not it went through there."""
    REFUNDED = "refunded"


class Charge(Table):
    """One attempt to take money. Its id is the idempotency key at the gateway: resumed, it is the same."""

    __tablename__ = "charges"

    id: Mapped[str] = mapped_column(String(36), primary_key=True, default=new_id)
    pledge_id: Mapped[str] = mapped_column(ForeignKey("pledges.id"), index=True)
    purpose: Mapped[Purpose] = mapped_column(stored_enum(Purpose))
    activation: Mapped[int | None]
    """Of a first month: the pool's attempt to go live that it belongs to."""
    amount_cents: Mapped[int] = mapped_column(BigInteger)
    token: Mapped[str | None] = mapped_column(String(200))
    """The card it was first tried with. It stays: with another one it would be another charge."""
    state: Mapped[ChargeState] = mapped_column(stored_enum(ChargeState), index=True)
    decline_code: Mapped[str | None] = mapped_column(String(50))
    created_at: Mapped[datetime.datetime]
    settled_at: Mapped[datetime.datetime | None]


class LedgerEntry(Table):
    """What the embedded gateway was asked to do: its memory, apart from ours."""

    __tablename__ = "ledger_entries"

    idempotency_key: Mapped[str] = mapped_column(String(100), primary_key=True)
    token: Mapped[str] = mapped_column(String(200))
    amount_cents: Mapped[int] = mapped_column(BigInteger)
    decline_code: Mapped[str | None] = mapped_column(String(50))
    refunded: Mapped[bool] = mapped_column(default=False)
    created_at: Mapped[datetime.datetime]
