"""`boosts admin` against a real control plane."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from boosts.client import Client
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
    assert line.split(maxsplit=5)[1:] == [
        "tiny",
        "funding",
        "0",
        "5",
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


def test_throughput_of_a_quiet_pool_is_empty(control_plane: RunningControlPlane, run: Run) -> None:
    said = good(run("admin", "throughput", control_plane.new_pool(), "--minutes", "5"))
    assert said == "no pledges that are subscribed\n\nno requests in this time\n"


def test_a_customers_key_opens_nothing(control_plane: RunningControlPlane, run: Run) -> None:
    key = control_plane.new_customer()
    said = bad(run("admin", "pools", "list", "--key", key))
    assert said.endswith("(operator_required); give an operator's key with --key or BOOSTS_MANAGEMENT_KEY")
