"""`boosts admin` against a real control plane."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from boosts.client import Client
from tests.contract.documents import capacity
from tests.unit.boosts.conftest import POOL, RunningControlPlane, bad, boosts, good

pytestmark = pytest.mark.slow

Run = Callable[..., Result]


@pytest.fixture
def run(control_plane: RunningControlPlane, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command as the operator, who set the two variables."""
    monkeypatch.setenv("BOOSTS_CONTROL_PLANE_URL", control_plane.url)
    monkeypatch.setenv("BOOSTS_MANAGEMENT_KEY", control_plane.operator_key)
    return boosts


def test_a_new_account_gets_a_key_that_works(control_plane: RunningControlPlane, run: Run) -> None:
    email = f"{uuid.uuid4()}@example.com"
    made = json.loads(good(run("admin", "accounts", "create", "Acme Inc.", email, "--json")))
    with Client(control_plane.url, made["managementKey"]) as client:
        client.pools()
    assert "(email_taken)" in bad(run("admin", "accounts", "create", "Acme", email))
    [line] = [line for line in good(run("admin", "accounts", "list")).splitlines() if made["id"] in line]
    assert f"Acme Inc.  {email}" in line


def test_a_pool_goes_from_a_file_to_open(run: Run, tmp_path: Path) -> None:
    slug = f"pool-{uuid.uuid4()}"
    file = tmp_path / "pool.json"
    file.write_text(json.dumps({**POOL, "slug": slug}))
    assert good(run("admin", "pools", "create", str(file))).startswith(f"pool {slug} is draft (")
    good(run("admin", "pools", "edit", slug, "-", stdin='{"minSeats": 5}'))
    assert good(run("admin", "pools", "open", slug)).startswith(f"pool {slug} is funding (")
    [line] = [line for line in good(run("admin", "pools", "list")).splitlines() if slug in line]
    assert line.split(maxsplit=7)[1:] == [
        "tiny",
        "funding",
        "0",
        "5",
        "20",
        "-",
        "night 3 at 27.00, americas 2 at 39.99",
    ]
    assert "(wrong_pool_status)" in bad(run("admin", "pools", "edit", slug, str(file)))
    assert "(wrong_pool_status)" in bad(run("admin", "pools", "pause", slug))


def test_a_file_that_is_no_pool_is_told(run: Run, tmp_path: Path) -> None:
    assert "cannot read" in bad(run("admin", "pools", "create", str(tmp_path / "none.json")))
    assert "cannot read -" in bad(run("admin", "pools", "create", "-", stdin="{"))
    assert "holds no JSON object" in bad(run("admin", "pools", "create", "-", stdin="[]"))
    said = bad(run("admin", "pools", "create", "-", stdin=json.dumps({**POOL, "slug": "x", "seats": 3})))
    assert "seats" in said
    assert "(invalid_request)" in said


def test_nodes_join_with_a_token_and_are_listed(control_plane: RunningControlPlane, run: Run) -> None:
    slug = control_plane.new_pool()
    said = good(run("admin", "nodes", "join-token", slug))
    assert f"boosts node --control-plane {control_plane.url} --join-token join_" in said
    control_plane.new_node(slug)
    [line] = [line for line in good(run("admin", "nodes", "list")).splitlines() if slug in line]
    node, _, _, state, *_ = line.split()
    assert state == "ready"
    assert good(run("admin", "nodes", "drain", node)).startswith(f"draining {node}")
    assert json.loads(good(run("admin", "nodes", "undrain", node, "--json")))["state"] == "ready"
    assert "(node_not_found)" in bad(run("admin", "nodes", "drain", "nobody"))


def test_a_pool_whose_capacity_is_not_declared_or_not_enough_is_told_what_to_do(run: Run) -> None:
    slug = f"pool-{uuid.uuid4()}"
    terms = json.dumps({**POOL, "slug": slug, "declaredCapacity": None})
    good(run("admin", "pools", "create", "-", stdin=terms))
    said = bad(run("admin", "pools", "open", slug))
    assert "`boosts capacity`" in said
    assert f"(capacity_undeclared); a draft takes it with `boosts admin pools edit {slug} -`" in said
    small = {"declaredCapacity": capacity(model_id="tiny", slots=2)}
    good(run("admin", "pools", "edit", slug, "-", stdin=json.dumps(small)))
    shown = good(run("admin", "pools", "show", slug))
    assert "3 seats at once on one node: too many (slots); it honours 2 at most" in shown
    assert "3 of 2 slots" in bad(run("admin", "pools", "open", slug))


def test_show_tells_what_a_pool_waits_for_and_what_its_nodes_honour(
    control_plane: RunningControlPlane, run: Run
) -> None:
    slug = control_plane.new_pool(minSeats=1)
    said = good(run("admin", "pools", "show", slug))
    assert "guarantee   20 tok/s for each seat" in said
    assert said.endswith("no nodes yet\n")
    with Client(control_plane.url, control_plane.new_customer()) as customer:
        customer.set_payment_method("pm_card_visa")
        customer.subscribe(slug, ["night"], 1)
    wait_until(lambda: "waits: No node of this pool is ready." in good(run("admin", "pools", "show", slug)))
    assert "(no_ready_node)" in good(run("admin", "pools", "list"))
    control_plane.new_node(slug)
    wait_until(lambda: "active" in good(run("admin", "pools", "show", slug)))
    [line] = [line for line in good(run("admin", "nodes", "list")).splitlines() if slug in line]
    assert line.split()[5:-1] == ["0", "1", "1", "256", "20", "-"]
    both = json.loads(good(run("admin", "pools", "show", slug, "--json")))
    assert [node["mostSeats"] for node in both["nodesNow"]] == [256]


def wait_until(holds: Callable[[], bool]) -> None:
    """The lifecycle has its own pace."""
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_throughput_of_a_quiet_pool_is_empty(control_plane: RunningControlPlane, run: Run) -> None:
    said = good(run("admin", "throughput", control_plane.new_pool(), "--minutes", "5"))
    assert said == "no pledges that are subscribed\n\nno requests in this time\n"


def test_a_customers_key_opens_nothing(control_plane: RunningControlPlane, run: Run) -> None:
    key = control_plane.new_customer()
    said = bad(run("admin", "pools", "list", "--key", key))
    assert said.endswith("(operator_required); give an operator's key with --key or BOOSTS_MANAGEMENT_KEY")
