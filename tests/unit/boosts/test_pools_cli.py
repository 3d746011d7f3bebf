"""`boosts pools` and `boosts billing` against a real control plane: output, errors, exit statuses."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import pytest
from typer.testing import Result

from boosts.client import Client
from tests.unit.boosts.conftest import RunningControlPlane, bad, boosts, good

pytestmark = pytest.mark.slow

Run = Callable[..., Result]


@pytest.fixture
def key(control_plane: RunningControlPlane) -> str:
    return control_plane.new_customer()


@pytest.fixture
def run(control_plane: RunningControlPlane, key: str) -> Run:
    """Run a command as a new customer."""
    return lambda *arguments: boosts(*arguments, "--url", control_plane.url, "--key", key)


def test_list_has_a_line_for_each_pool(control_plane: RunningControlPlane, run: Run) -> None:
    slug = control_plane.new_pool()
    lines = good(run("pools", "list")).splitlines()
    assert lines[0].split() == ["POOL", "MODEL", "STATUS", "SEATS", "TAKEN", "USD/MONTH", "FROM"]
    assert f"{slug}  Tiny   funding  0 of 5       27.00" in lines


def test_json_is_the_data_as_it_came(control_plane: RunningControlPlane, run: Run, key: str) -> None:
    slug = control_plane.new_pool()
    with Client(control_plane.url, key) as client:
        assert json.loads(good(run("pools", "show", slug, "--json"))) == client.pool(slug)
        assert json.loads(good(run("pools", "list", "--json"))) == client.pools()


def test_show_gives_prices_by_block_and_not_by_hour(control_plane: RunningControlPlane, run: Run) -> None:
    slug = control_plane.new_pool()
    said = good(run("pools", "show", slug))
    assert "0 of 5 taken, goes live with 4" in said
    assert "20 tok/s guaranteed, up to 60 requests and 1000 tokens per minute" in said
    assert [line.split() for line in said.splitlines()[-3:]] == [
        ["BLOCK", "UTC", "SEATS", "FREE", "USD/MONTH"],
        ["night", "00-08", "h", "3", "3", "27.00"],
        ["americas", "16-24", "h", "2", "2", "39.99"],
    ]


def test_a_seat_is_bought_shown_and_given_back(control_plane: RunningControlPlane, run: Run) -> None:
    slug = control_plane.new_pool()
    no_card = bad(run("pools", "subscribe", slug, "--block", "night"))
    assert no_card.startswith("boosts pools subscribe: ")
    assert no_card.endswith(
        "(payment_method_required); put a card on file with `boosts billing payment-method pm_card_visa`"
    )
    assert good(run("billing", "payment-method", "pm_card_visa")) == "on file: visa ending in 4242\n"
    order = ("pools", "subscribe", slug, "--block", "night", "--block", "americas", "--quantity", "1")
    assert good(run(*order)) == (
        "pledged: 1 seat in night, americas for 66.99 USD a month\n"
        f"the key comes when the pool goes live; see it then with: boosts pools my-key {slug}\n"
    )
    assert f"`boosts pools my-pledge {slug}`" in bad(run(*order))
    pledge = good(run("pools", "my-pledge", slug))
    assert "seats       1 in night, 1 in americas\n" in pledge
    assert "key         none until the pool is live\n" in pledge
    assert "paid until" not in pledge
    assert "(key_not_found)" in bad(run("pools", "my-key", slug))
    assert good(run("pools", "my-throughput", slug)).endswith("no requests in this time\n")
    assert good(run("pools", "cancel", slug)) == f"canceled: your seats in {slug} are free again\n"
    assert "(pledge_not_found)" in bad(run("pools", "my-pledge", slug))


def test_a_live_pool_gives_the_key_at_once(control_plane: RunningControlPlane, run: Run, key: str) -> None:
    slug = control_plane.new_pool(minSeats=1)
    control_plane.new_node(slug)
    first = control_plane.new_customer()
    with Client(control_plane.url, first) as client:
        client.set_payment_method("pm_card_visa")
        client.subscribe(slug, ["night"], 1)
        deadline = time.monotonic() + 30
        while client.pool(slug)["status"] != "active":
            assert time.monotonic() < deadline
            time.sleep(0.05)
    good(run("billing", "payment-method", "pm_card_visa"))
    said = good(run("pools", "subscribe", slug, "--block", "night", "--quantity", "2")).splitlines()
    assert said[0] == "active: 2 seats in night for 54.00 USD a month"
    assert said[1].startswith("key       sk_pool_")
    assert said[2] == "base URL  http://127.0.0.1:9"
    assert said[3] == "limits    120 requests, 2000 tokens per minute"
    assert good(run("pools", "my-key", slug)).splitlines() == said[1:]
    refused = bad(run("pools", "cancel", slug))
    assert refused.endswith(f"(use_billing_portal); from here: `boosts billing cancel {slug}`")


def test_a_subscription_is_ended_with_its_month_and_taken_up_again(
    control_plane: RunningControlPlane, run: Run
) -> None:
    slug = control_plane.new_pool(minSeats=1)
    control_plane.new_node(slug)
    assert good(run("billing", "show")) == "no pledges\n"
    assert "(pledge_not_found)" in bad(run("billing", "cancel", slug))
    good(run("billing", "payment-method", "pm_card_visa"))
    good(run("pools", "subscribe", slug, "--block", "night"))
    wait_until_active(run, slug)
    end = json.loads(good(run("pools", "my-pledge", slug, "--json")))["currentPeriodEnd"]
    ends = f"your subscription in {slug} ends at {end}; the key works until then\n"
    assert good(run("billing", "cancel", slug)) == ends
    assert good(run("billing", "show")).splitlines()[1].split() == [slug, "active", "27.00", end, "ends"]
    assert good(run("billing", "resume", slug)) == f"your subscription in {slug} renews at {end}\n"
    assert good(run("billing", "show")).splitlines()[1].endswith("renews")


def wait_until_active(run: Run, slug: str) -> None:
    deadline = time.monotonic() + 30
    while json.loads(good(run("pools", "my-pledge", slug, "--json")))["status"] != "active":
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_declined_card_asks_for_another(control_plane: RunningControlPlane, run: Run) -> None:
    slug = control_plane.new_pool()
    good(run("billing", "payment-method", "pm_card_chargeDeclined"))
    said = bad(run("pools", "subscribe", slug, "--block", "night"))
    assert "put another card on file and subscribe again (card_declined)" in said


def test_unknown_pools_and_keys_are_told(control_plane: RunningControlPlane, run: Run) -> None:
    assert "`boosts pools list` shows those there are" in bad(run("pools", "show", "nothing"))
    key = control_plane.operator_key[:-1] + ("0" if control_plane.operator_key[-1] != "0" else "1")
    assert "mistyped" in bad(boosts("pools", "list", "--url", control_plane.url, "--key", key))


def test_a_wrong_option_is_a_usage_error(run: Run) -> None:
    assert run("pools", "subscribe", "demo", "--block", "noon").exit_code == 2
    assert run("pools", "subscribe", "demo", "--block", "night", "--quantity", "21").exit_code == 2
