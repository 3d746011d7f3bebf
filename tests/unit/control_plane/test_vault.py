"""What is encrypted can be read with its key and in its place, and nowhere else."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from control_plane.database import Database
from control_plane.keys import service as keys
from control_plane.vault import Vault, VaultError
from tests.unit.control_plane.market import (
    Market,
    empty_ground,  # noqa: F401 - a fixture
    on_sqlite_only,
    open_market,  # noqa: F401 - a fixture
)

VAULT = Vault(bytes(32))


def test_what_was_encrypted_is_read_again() -> None:
    assert VAULT.decrypt(VAULT.encrypt(b"secret", "row"), "row") == b"secret"


def test_the_same_text_is_never_encrypted_alike() -> None:
    assert VAULT.encrypt(b"secret", "row") != VAULT.encrypt(b"secret", "row")


def test_the_text_does_not_show() -> None:
    assert b"secret" not in VAULT.encrypt(b"secret", "row")


def test_another_row_another_key_or_a_changed_bit_is_refused() -> None:
    sealed = VAULT.encrypt(b"secret", "row")
    changed = sealed[:-1] + bytes([sealed[-1] ^ 1])
    for vault, data, row in (
        (VAULT, sealed, "other row"),
        (Vault(b"x" * 32), sealed, "row"),
        (VAULT, changed, "row"),
        (VAULT, sealed[:20], "row"),
    ):
        with pytest.raises(VaultError):
            vault.decrypt(data, row)


@pytest.mark.parametrize("text", ["", "no base64!", base64.b64encode(bytes(31)).decode(), "ö"])
def test_a_key_is_32_bytes_in_base64(text: str) -> None:
    with pytest.raises(VaultError, match="32 bytes in base64"):
        Vault.from_text(text)


def test_a_keyfile_is_made_once_and_for_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "encryption.key"
    sealed = Vault.from_file(path).encrypt(b"secret", "row")
    assert path.stat().st_mode & 0o777 == 0o600
    assert Vault.from_file(path).decrypt(sealed, "row") == b"secret"


def test_a_spoilt_keyfile_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "encryption.key"
    path.touch()
    with pytest.raises(VaultError):
        Vault.from_file(path)
    assert path.read_text() == ""


async def check(database: Database, vault: Vault) -> None:
    await keys.check_vault(database, vault)


@on_sqlite_only
async def test_a_database_of_another_key_is_noticed_before_anybody_misses_a_key(market: Market) -> None:
    await check(market.database, Vault(b"x" * 32))
    await market.live_pool()
    await check(market.database, market.context.vault)
    with pytest.raises(VaultError, match="another key"):
        await check(market.database, Vault(b"x" * 32))
