"""The whole product in one command: buying and using seats over HTTP, and parts of it that die meanwhile."""

from __future__ import annotations

import contextlib
import signal
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import pytest

from contract.blocks import Block
from tests.integration.conftest import wait_for
from tests.integration.stack import (
    ALL_BLOCKS,
    Account,
    Stack,
    Traffic,
    all_gone,
    assert_error,
    running_stack,
    status_of,
)

pytestmark = pytest.mark.vllm

REPORTED_S = 40.0
"""Counters are reported every 10 s, and sent again soon after the control plane is back."""


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with running_stack(Stack(tmp_path_factory.mktemp("stack") / "home")) as stack:
        stack.wait_until_live()
        yield stack


@pytest.fixture(scope="module")
def customer(stack: Stack) -> Account:
    """The demo customer, who holds a seat in every block."""
    return Account(stack, stack.demo()["customer_key"])


def block_that_is_closed() -> Block:
    """The one that ended last: its next start is hours away."""
    return list(Block)[time.gmtime().tm_hour // 8 - 1]


# ---- what is there to buy ----


def test_demo_json_opens_everything(stack: Stack, customer: Account) -> None:
    demo = stack.demo()
    assert stat.S_IMODE((stack.home / "demo.json").stat().st_mode) == 0o600
    assert demo["control_plane_url"] == stack.control_plane_url
    assert demo["inference_url"] == stack.inference_url
    assert demo["pool_slug"] == "demo"
    assert stack.infer(demo["boost_key"]).status_code == 200
    assert customer.data("GET", "/api/pools/demo/my-key")["apiKey"] == demo["boost_key"]
    assert status_of(f"{demo['stats_url']}/readyz") == 200
    assert status_of(f"{demo['agent_url']}/readyz") == 200
    assert stack.as_operator("GET", "/api/admin/nodes")[0]["baseUrl"] == stack.inference_url


def test_printed_examples_work_when_pasted(stack: Stack) -> None:
    printed = stack.output.read_text()
    curl = printed[printed.index("curl ") : printed.index("\n\n", printed.index("curl "))]
    assert '"completion_tokens":32' in pasted(curl)
    shown = printed[printed.index("pools list") - 200 : printed.index("pools list") + len("pools list")]
    assert "demo" in pasted(shown.rpartition("\n")[2])


def pasted(command: str) -> str:
    done = subprocess.run(["/bin/sh", "-c", command], capture_output=True, text=True, timeout=60, check=True)
    return done.stdout


def test_pools_are_listed(customer: Account) -> None:
    [pool] = customer.data("GET", "/api/pools")
    assert set(pool) >= {"id", "slug", "modelId", "modelName", "description", "infraSpec"}
    assert pool["status"] == "active"
    assert pool["totalSlots"] == 30
    assert pool["pledgedSlots"] >= 3
    assert pool["minPricePerDay"] == "27.00"


def test_a_pool_is_read_by_id_and_by_slug(customer: Account) -> None:
    pool = customer.data("GET", "/api/pools/demo")
    assert customer.data("GET", f"/api/pools/{pool['id']}") == pool
    hours = [(slot["slotIndex"], slot["hour"]) for slot in pool["hourSlots"]]
    assert sorted(hours) == [(seat, hour) for seat in range(10) for hour in range(24)]
    assert all(
        set(slot) == {"id", "hour", "slotIndex", "pricePerDay", "status"} for slot in pool["hourSlots"]
    )


def test_prices_of_the_hours_add_up_to_that_of_the_block(customer: Account) -> None:
    slots = customer.data("GET", "/api/pools/demo")["hourSlots"]
    first = [slot["pricePerDay"] for slot in slots if slot["slotIndex"] == 0]
    assert first[:4] == ["3.38", "3.37", "3.38", "3.37"]
    for block in Block:
        assert sum(map(Decimal, first[block.first_hour : block.first_hour + 8])) == Decimal("27.00")


# ---- buying ----


def test_a_seat_needs_a_card_that_pays(stack: Stack) -> None:
    account = stack.new_account()
    order = {"blocks": ["night", "europe", "americas"]}
    free = len([s for s in account.data("GET", "/api/pools/demo")["hourSlots"] if s["status"] == "available"])
    assert_error(account.call("POST", "/api/pools/demo/subscribe", order), 402, "payment_method_required")
    account.put_card("pm_card_chargeDeclined")
    assert_error(account.call("POST", "/api/pools/demo/subscribe", order), 402, "card_declined")
    slots = account.data("GET", "/api/pools/demo")["hourSlots"]
    assert len([slot for slot in slots if slot["status"] == "available"]) == free
    account.put_card("pm_card_visa")
    made = account.data("POST", "/api/pools/demo/subscribe", order)
    assert (made["status"], made["monthlyPrice"], made["slotCount"]) == ("active", "81.00", 24)


def test_a_seat_in_the_live_pool_answers_within_five_seconds(stack: Stack) -> None:
    account = stack.new_account()
    account.put_card()
    began = time.monotonic()
    order = {"blocks": list(ALL_BLOCKS), "quantity": 2}
    made = account.data("POST", "/api/pools/demo/subscribe", order)
    key = made["key"]
    wait_for(lambda: stack.infer(key["apiKey"]).status_code == 200, 5)
    assert time.monotonic() - began < 5
    assert key["baseUrl"] == stack.inference_url
    assert (key["rpmLimit"], key["tpmLimit"], key["isActive"]) == (12_000, 20_000_000, True)
    pledge = account.data("GET", "/api/pools/demo/my-pledge")
    assert (pledge["id"], pledge["status"], pledge["key"]) == (made["id"], "active", key)
    assert len(pledge["hours"]) == made["slotCount"] == 48
    assert account.data("GET", "/api/pools/demo/my-key") == key
    assert_error(account.call("POST", "/api/pools/demo/subscribe", order), 409, "pledge_exists")
    error = assert_error(account.call("DELETE", "/api/pools/demo/pledge"), 409, "use_billing_portal")
    assert stack.control_plane_url in error["message"]


def test_a_key_is_refused_outside_its_blocks(stack: Stack) -> None:
    account = stack.new_account()
    account.put_card()
    order = {"blocks": [block_that_is_closed().value]}
    key = account.data("POST", "/api/pools/demo/subscribe", order)["key"]["apiKey"]
    wait_for(lambda: stack.infer(key).status_code != 401, 5)
    answer = stack.infer(key)
    assert answer.status_code == 429
    assert answer.json()["error"]["code"] == "outside_reserved_block"
    assert answer.headers["x-should-retry"] == "false"


def test_nobody_else_sees_a_pledge(stack: Stack) -> None:
    other = stack.new_account()
    for path in ("my-pledge", "my-key", "my-throughput"):
        assert_error(other.call("GET", f"/api/pools/demo/{path}"), 404, "pledge_not_found")


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("GET", "/api/pools/nothing", None, 404, "pool_not_found"),
        ("GET", "/api/nowhere", None, 404, "not_found"),
        ("PUT", "/api/pools", None, 405, "method_not_allowed"),
        ("POST", "/api/pools/demo/subscribe", {"blocks": ["noon"]}, 422, "invalid_request"),
        ("POST", "/api/pools/demo/subscribe", {"blocks": ["night", "night"]}, 422, "invalid_request"),
        ("POST", "/api/pools/demo/subscribe", {"blocks": ["night"], "quantity": 21}, 422, "invalid_request"),
        ("GET", "/api/admin/accounts", None, 403, "operator_required"),
    ],
)
def test_errors_come_in_the_envelope(
    customer: Account, method: str, path: str, body: object, status: int, code: str
) -> None:
    assert_error(customer.call(method, path, body), status, code)


def test_no_key_is_401_in_the_envelope(stack: Stack) -> None:
    assert_error(stack.call("GET", "/api/pools"), 401, "unauthorized")
    assert_error(stack.call("GET", "/api/pools", key="mk_wrong"), 401, "unauthorized")


# ---- what was delivered ----


def test_my_throughput_agrees_with_what_the_client_counted(stack: Stack) -> None:
    account, key = stack.new_seat()
    began = time.monotonic()
    traffic = Traffic(stack.inference_url, key, tokens_each=2000)
    time.sleep(12)
    traffic.stop()
    lasted_s = time.monotonic() - began
    assert not traffic.faults
    assert traffic.tokens > 500
    wait_for(lambda: account.delivered_tokens() >= 0.99 * traffic.tokens, REPORTED_S)
    found = account.data("GET", "/api/pools/demo/my-throughput?minutes=5")
    assert abs(found["totals"]["deliveredTokens"] - traffic.tokens) <= 0.01 * traffic.tokens
    assert sum(minute["deliveredTokens"] for minute in found["minutes"]) == found["totals"]["deliveredTokens"]
    assert 0 < found["totals"]["owedTokens"] <= found["totals"]["deliveredTokens"] + 20
    assert found["totals"]["attainment"] > 0.9
    # Whole seconds throughout which something was owed: not those in which a stream begins or ends.
    assert 3 <= found["totals"]["owedSeconds"] <= lasted_s
    assert 0 <= found["totals"]["missedSeconds"] <= found["totals"]["owedSeconds"]


# ---- parts that die ----


def test_a_second_run_in_the_same_folder_is_refused(stack: Stack) -> None:
    command = [sys.executable, "-m", "boosts", "run"]
    second = subprocess.run(
        command, env=stack.environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert second.returncode == 1
    assert f"another `boosts run` uses {stack.home}" in second.stderr


def test_a_frozen_control_plane_stops_nobody_and_loses_nothing(stack: Stack) -> None:
    account, key = stack.new_seat()
    traffic = Traffic(stack.inference_url, key, tokens_each=1000)
    control_plane = stack.running("control_plane.main")
    control_plane.suspend()
    try:
        # Longer than a report's interval: at least one has to wait.
        time.sleep(15)
        traffic.wait_for_progress()
    finally:
        control_plane.resume()
    traffic.stop()
    assert not traffic.faults
    assert traffic.longest_gap_s < 5
    wait_for(lambda: account.delivered_tokens() >= traffic.tokens, REPORTED_S)
    assert account.delivered_tokens() == traffic.tokens


def test_a_killed_control_plane_comes_back_and_loses_nothing(stack: Stack) -> None:
    account, key = stack.new_seat()
    traffic = Traffic(stack.inference_url, key, tokens_each=1000)
    killed = stack.running("control_plane.main")
    killed.kill()
    wait_for(lambda: status_of(f"{stack.control_plane_url}/readyz") == 200, 60)
    assert stack.running("control_plane.main").pid != killed.pid
    traffic.stop()
    assert not traffic.faults
    assert traffic.longest_gap_s < 5
    wait_for(lambda: account.delivered_tokens() >= traffic.tokens, REPORTED_S)
    assert account.delivered_tokens() == traffic.tokens
    assert "control plane was killed by SIGKILL; it is started again" in stack.output.read_text()


def test_a_killed_agent_leaves_streams_alone_and_the_next_one_adopts_the_node(stack: Stack) -> None:
    account, key = stack.new_seat()
    traffic = Traffic(stack.inference_url, key, tokens_each=2000)
    serving, killed = stack.serving_pid(), stack.running("agent.main")
    killed.kill()
    wait_for(lambda: status_of(f"{stack.agent_url}/readyz") == 200, 60)
    traffic.wait_for_progress()
    assert stack.running("agent.main").pid != killed.pid
    assert stack.serving_pid() == serving is not None
    traffic.stop()
    assert not traffic.faults
    assert traffic.longest_gap_s < 5
    wait_for(lambda: account.delivered_tokens() >= traffic.tokens, REPORTED_S)
    assert account.delivered_tokens() == traffic.tokens


@pytest.mark.parametrize("victim", ["serving.main", "EngineCore"])
def test_killed_serving_comes_back_by_itself_with_its_seats(
    stack: Stack, customer: Account, victim: str
) -> None:
    key = stack.demo()["boost_key"]
    before = stack.serving_pid()
    stack.running(victim).kill()
    wait_for(lambda: status_of(f"{stack.inference_url}/v1/models", key) == 0, 30)
    wait_for(lambda: status_of(f"{stack.inference_url}/v1/models", key) == 200, 300)
    assert stack.serving_pid() not in (None, before)
    assert stack.infer(key).status_code == 200
    assert customer.data("GET", "/api/pools/demo/my-key")["apiKey"] == key
    assert customer.data("GET", "/api/pools")[0]["status"] == "active"


def test_stopping_leaves_no_process_and_the_next_run_finds_everything(stack: Stack) -> None:
    # The last test of this module: it stops the stack.
    before = stack.demo()
    accounts = stack.as_operator("GET", "/api/admin/accounts")
    nodes = [node["id"] for node in stack.as_operator("GET", "/api/admin/nodes")]
    [pool] = stack.as_operator("GET", "/api/admin/pools")
    members = stack.processes()
    assert len(members) >= 5
    assert stack.stop() < 10
    assert stack.process.returncode == 0
    assert all_gone(members)
    stack.start()
    wait_for(lambda: stack.serving_pid() is not None, 120)
    assert stack.as_operator("GET", "/api/admin/accounts") == accounts
    assert [node["id"] for node in stack.as_operator("GET", "/api/admin/nodes")] == nodes
    [again] = stack.as_operator("GET", "/api/admin/pools")
    # The node is lost until the model is loaded.
    of_now = {"revision": None, "alarms": None, "attainment60s": None}
    assert {**again, **of_now} == {**pool, **of_now}
    kept = Account(stack, before["customer_key"]).data("GET", "/api/pools/demo/my-key")
    assert kept["apiKey"] == before["boost_key"]
    # Ctrl-C, while the model loads.
    members = stack.processes()
    assert stack.stop(signal.SIGINT) < 10
    assert all_gone(members)


# ---- a pool of one's own ----


def pool_status(account: Account) -> str:
    status: str = account.data("GET", "/api/pools/demo")["status"]
    return status


def refunded_cents(stack: Stack) -> list[int]:
    """What the embedded payment gateway gave back, by its own book."""
    book = sqlite3.connect(f"file:{stack.home}/control-plane/control-plane.db?mode=ro", uri=True)
    with contextlib.closing(book):
        rows = book.execute("SELECT amount_cents FROM ledger_entries WHERE refunded AND decline_code IS NULL")
        return [cents for (cents,) in rows]


def test_a_pool_goes_live_when_its_threshold_is_reached_and_paid(tmp_path: Path) -> None:
    overrides = {"minSeats": 5, "blocks": {b.value: {"seats": 12, "monthlyPrice": "40.00"} for b in Block}}
    stack = Stack(tmp_path / "home", overrides=overrides)
    with running_stack(stack):
        stack.wait_for_output("pool demo is funding: 3 of 5 seats", 120)
        assert stack.demo()["boost_key"] is None
        first = Account(stack, stack.demo()["customer_key"])
        pledge = first.data("GET", "/api/pools/demo/my-pledge")
        assert (pledge["status"], pledge["key"], pledge["monthlyPrice"]) == ("pledged", None, "120.00")
        assert_error(first.call("GET", "/api/pools/demo/my-key"), 404, "key_not_found")
        # One who goes again, before it matters.
        fickle = stack.new_account()
        fickle.put_card()
        fickle.data("POST", "/api/pools/demo/subscribe", {"blocks": ["night"]})
        assert fickle.data("DELETE", "/api/pools/demo/pledge") == {"canceled": True}
        assert_error(fickle.call("GET", "/api/pools/demo/my-pledge"), 404, "pledge_not_found")
        # By the lines that `boosts run` printed, but for the key.
        second = stack.new_account()
        second.put_card()
        command = [sys.executable, "-m", "boosts", "pools", "subscribe", "demo", "--key", second.key]
        command += ["--block", "night", "--quantity", "2"]
        said = subprocess.run(
            command, env=stack.environment, capture_output=True, text=True, timeout=60, check=True
        )
        assert said.stdout.startswith("pledged: 2 seats in night for 80.00 USD a month")
        # A card that is declined when the pool goes live, and leaves it with too few seats.
        second.put_card("pm_card_chargeDeclined")
        wait_for(lambda: pool_status(first) == "activating", 10)
        wait_for(lambda: pool_status(first) == "funding", 240)
        pledge = first.data("GET", "/api/pools/demo/my-pledge")
        assert (pledge["status"], pledge["key"]) == ("pledged", None)
        assert_error(second.call("GET", "/api/pools/demo/my-pledge"), 404, "pledge_not_found")
        wait_for(lambda: refunded_cents(stack) == [120_00], 10)
        second.put_card("pm_card_visa")
        again = second.data("POST", "/api/pools/demo/subscribe", {"blocks": ["night"], "quantity": 2})
        assert again["status"] == "pledged"
        stack.wait_until_live()
        for account in (first, second):
            pledge = account.data("GET", "/api/pools/demo/my-pledge")
            assert pledge["status"] == "active"
            assert stack.infer(pledge["key"]["apiKey"]).status_code in (200, 429)
        key = first.data("GET", "/api/pools/demo/my-key")["apiKey"]
        assert stack.demo()["boost_key"] == key
        assert stack.infer(key).status_code == 200
        # Even SIGKILL leaves nothing behind.
        members = stack.processes()
        assert len(members) >= 5
        stack.process.send_signal(signal.SIGKILL)
        wait_for(lambda: all_gone(members), 20)
