"""Boost keys: made once per pledge, stored encrypted beside their hash."""

from __future__ import annotations

import datetime

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from contract.keys import KeyKind, key_sha256, new_key
from control_plane.database import Database, new_id
from control_plane.keys.tables import BoostKey
from control_plane.vault import Vault


async def ensure(session: AsyncSession, vault: Vault, pledge_id: str, now: datetime.datetime) -> None:
    """Give the pledge its key, unless it has one. The pool must be locked."""
    if await session.scalar(select(BoostKey.id).where(BoostKey.pledge_id == pledge_id)):
        return
    text = new_key(KeyKind.BOOST)
    key_id = new_id()
    session.add(
        BoostKey(
            id=key_id,
            pledge_id=pledge_id,
            key_sha256=key_sha256(text),
            encrypted=vault.encrypt(text.encode(), key_id),
            created_at=now,
        )
    )


async def of_pledge(session: AsyncSession, vault: Vault, pledge_id: str) -> tuple[str, str] | None:
    """Id and text of the pledge's key. Raises VaultError when it was encrypted with another key."""
    row = await session.scalar(select(BoostKey).where(BoostKey.pledge_id == pledge_id))
    return None if row is None else (row.id, vault.decrypt(row.encrypted, row.id).decode())


async def check_vault(database: Database, vault: Vault) -> None:
    """Raises VaultError if the vault cannot open what is stored: better no start than no keys."""
    async with database.read() as session:
        row = await session.scalar(select(BoostKey).limit(1))
    if row is not None:
        vault.decrypt(row.encrypted, row.id)
