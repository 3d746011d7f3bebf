"""Accounts and the hashes of their management keys."""

from __future__ import annotations

import datetime
import enum

from sqlalchemy import ForeignKey, String
from sqlalchemy.orm import Mapped, mapped_column

from control_plane.database import Table, new_id, stored_enum


class Role(enum.Enum):
    CUSTOMER = "customer"
    OPERATOR = "operator"


class Account(Table):
    __tablename__ = "accounts"

    id: Mapped[str] = mapped_column(String(36), primary_key=True, default=new_id)
    name: Mapped[str] = mapped_column(String(200))
    email: Mapped[str] = mapped_column(String(320), unique=True)
    role: Mapped[Role] = mapped_column(stored_enum(Role))
    created_at: Mapped[datetime.datetime]


class ManagementKey(Table):
    """Only the hash: the key itself is shown once, when it is made."""

    __tablename__ = "management_keys"

    id: Mapped[str] = mapped_column(String(36), primary_key=True, default=new_id)
    account_id: Mapped[str] = mapped_column(ForeignKey("accounts.id"), index=True)
    key_sha256: Mapped[str] = mapped_column(String(64), unique=True)
    created_at: Mapped[datetime.datetime]


class IdempotentCall(Table):
    """A POST with an `Idempotency-Key`, and its answer once it succeeded. Kept for a day."""

    __tablename__ = "idempotent_calls"

    account_id: Mapped[str] = mapped_column(ForeignKey("accounts.id"), primary_key=True)
    key: Mapped[str] = mapped_column(String(255), primary_key=True)
    request_sha256: Mapped[str] = mapped_column(String(64))
    started_at: Mapped[datetime.datetime] = mapped_column(index=True)
    status: Mapped[int | None]
    """Of the answer; null while the call runs."""
    answer: Mapped[bytes | None]
    """Encrypted: it may hold a key."""
