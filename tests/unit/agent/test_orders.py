"""Orders on disk: newer ones are followed, all others leave the last good ones in place."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from agent.orders import OrdersStore
from contract.entitlements import parse_entitlements
from contract.errors import ContractError
from contract.nodes import Orders
from tests.unit.agent.control_plane_stand_in import orders


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path


def stored(home: Path, *all_orders: Orders) -> OrdersStore:
    store = OrdersStore(home)
    store.load()
    for each in all_orders:
        assert store.accept(each)
    return store


def entitlements_revision(home: Path) -> int:
    return parse_entitlements((home / "entitlements.json").read_bytes()).revision


def test_new_home_has_no_orders(home: Path) -> None:
    store = stored(home)
    assert (store.current, store.store_id, store.revision) == (None, "", 0)
    assert list(home.iterdir()) == []


def test_newer_orders_are_on_disk_with_their_predecessor(home: Path) -> None:
    stored(home, orders(3), orders(4, serve=False))
    assert stored(home).current == orders(4, serve=False)
    assert Orders.parse((home / "orders.previous.json").read_bytes(), "previous") == orders(3)
    assert entitlements_revision(home) == 4
    assert {path.name for path in home.iterdir()} == {
        "orders.json",
        "orders.previous.json",
        "entitlements.json",
    }


def test_orders_are_for_their_owner_alone(home: Path) -> None:
    stored(home, orders(3), orders(4))
    assert {stat.S_IMODE(path.stat().st_mode) for path in home.iterdir()} == {0o600}


@pytest.mark.parametrize("bad", [orders(4), orders(5, serve=False)], ids=["older", "same revision"])
def test_older_or_changed_orders_of_the_same_revision_are_refused(home: Path, bad: Orders) -> None:
    store = stored(home, orders(5))
    with pytest.raises(ContractError, match="is not newer than 5"):
        store.accept(bad)
    assert store.current == orders(5)
    assert stored(home).current == orders(5)


def test_same_orders_again_are_no_news(home: Path) -> None:
    store = stored(home, orders(5))
    assert not store.accept(orders(5))


def test_another_store_begins_its_own_count(home: Path) -> None:
    store = stored(home, orders(5))
    assert store.accept(orders(1, entitlements={"store_id": "restored"}))
    assert (store.store_id, store.revision) == ("restored", 1)
    assert entitlements_revision(home) == 1


@pytest.mark.parametrize("damage", ["", "{", "null", '{"version": 1}', None])
def test_damaged_orders_fall_back_on_the_previous_and_say_so(
    home: Path, caplog: pytest.LogCaptureFixture, damage: str | None
) -> None:
    stored(home, orders(3), orders(4))
    latest = home / "orders.json"
    latest.unlink() if damage is None else latest.write_text(damage)
    store = stored(home)
    assert store.current == orders(3)
    assert "following the previous orders, revision 3" in caplog.text
    # Serving has the newer entitlements already, and would refuse the older.
    assert entitlements_revision(home) == 4
    assert store.accept(orders(4))
    assert stored(home).current == orders(4)


def test_lost_entitlements_are_written_again_at_start(home: Path) -> None:
    stored(home, orders(3))
    (home / "entitlements.json").write_text("{")
    stored(home)
    assert entitlements_revision(home) == 3


def test_orders_that_cannot_be_written_are_not_followed(home: Path) -> None:
    store = stored(home, orders(3))
    (home / "entitlements.json.new").mkdir()
    with pytest.raises(OSError, match="directory"):
        store.accept(orders(4))
    assert store.current == orders(3)
    (home / "entitlements.json.new").rmdir()
    assert store.accept(orders(4))
    assert entitlements_revision(home) == 4
