"""Boost keys."""

from __future__ import annotations

import datetime

from sqlalchemy import ForeignKey, String
from sqlalchemy.orm import Mapped, mapped_column

from control_plane.database import Table, new_id


class BoostKey(Table):
    """The inference key of one pledge, from its activation on."""

    __tablename__ = "boost_keys"

    id: Mapped[str] = mapped_column(String(36), primary_key=True, default=new_id)
    pledge_id: Mapped[str] = mapped_column(ForeignKey("pledges.id"), unique=True)
    key_sha256: Mapped[str] = mapped_column(String(64), unique=True)
    """What nodes get."""
    encrypted: Mapped[bytes]
    """The key itself, for its owner to see again."""
    created_at: Mapped[datetime.datetime]
