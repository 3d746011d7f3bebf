"""What the demo stack asks for and what it makes in a control plane: once, however often it runs."""

from __future__ import annotations

import json
import socket
import subprocess
import uuid
from decimal import Decimal
from pathlib import Path

import pytest

from boosts.client import Client
from boosts.demo_pool import (
    DemoKeys,
    demo_terms,
    find_keys,
    find_pledge,
    open_pool,
    take_seats,
)
from boosts.settings import Ports, StackError, StackSettings
from contract.blocks import Block
from contract.capacity import feasibility
from tests.contract.documents import capacity
from tests.unit.boosts.conftest import POOL, RunningControlPlane

pytestmark = pytest.mark.slow


def settings(environment: dict[str, str], model: str | None = None) -> StackSettings:
    return StackSettings.from_environment(environment, model, ())


def overridden(tmp_path: Path, content: str) -> StackSettings:
    file = tmp_path / "overrides.json"
    file.write_text(content)
    return settings({"BOOSTS_DEMO_POOL": str(file)})


# ---- what is asked for ----


def test_the_demo_pool_has_ten_seats_and_more_in_every_block() -> None:
    terms = demo_terms(None, {})
    assert terms.slug == "demo"
    assert set(terms.blocks) == set(Block)
    assert all(offer.seats >= 10 for offer in terms.blocks.values())
    # The demo customer takes a seat in each block, and the pool goes live.
    assert terms.min_seats == 3


def test_a_file_replaces_whole_fields(tmp_path: Path) -> None:
    content = '{"minSeats": 2, "blocks": {"night": {"seats": 4, "monthlyPrice": "9.50"}}}'
    terms = overridden(tmp_path, content).terms
    assert terms.min_seats == 2
    assert {block: offer.monthly_price for block, offer in terms.blocks.items()} == {
        Block.NIGHT: Decimal("9.50")
    }
    assert terms.guarantee_tok_s == 20


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot read"),
        ("[]", "holds no JSON object"),
        ('{"seats": 3}', "BOOSTS_DEMO_POOL: seats: Extra inputs are not permitted"),
        ('{"min_seats": 3}', "BOOSTS_DEMO_POOL: min_seats: Extra inputs are not permitted"),
        ('{"slug": "My Pool"}', "BOOSTS_DEMO_POOL: slug: "),
        ('{"minSeats": 31}', "the blocks have only 30 seats in all"),
    ],
)
def test_a_bad_file_is_told_before_anything_starts(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(StackError, match=message):
        overridden(tmp_path, content)


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(StackError, match="cannot read"):
        settings({"BOOSTS_DEMO_POOL": str(tmp_path / "none")})


@pytest.mark.parametrize(
    ("model", "slug"),
    [
        ("Qwen/Qwen3-0.6B", "qwen3-0-6b"),
        ("/models/My_Model/", "my-model"),
        ("tiny", "tiny"),
        ("???", "model"),
    ],
)
def test_a_model_of_ones_own_has_a_pool_of_its_own(model: str, slug: str) -> None:
    own = settings({"BOOSTS_HOME": "/data"}, model)
    assert own.terms.slug == slug
    assert own.terms.model_id == model
    assert own.node_home == Path(f"/data/node-{slug}")


def test_the_declared_capacity_honours_the_demo_pool() -> None:
    terms = demo_terms(None, {})
    assert terms.guarantee_tok_s == 20
    assert terms.declared_capacity is not None
    judged = feasibility(
        terms.declared_capacity,
        seats=max(offer.seats for offer in terms.blocks.values()),
        guarantee_tok_s=terms.guarantee_tok_s,
        tpm_limit=terms.tpm_limit,
        prefill_tok_s=terms.prefill_tok_s,
    )
    assert judged.fits


def test_of_a_model_of_ones_own_nothing_is_guaranteed_until_its_capacity_is_declared() -> None:
    unknown = demo_terms("acme/large", {})
    assert (unknown.guarantee_tok_s, unknown.declared_capacity) == (0, None)
    declared = demo_terms(
        "acme/large", {"declaredCapacity": capacity(model_id="acme/large"), "guaranteeTokS": 30}
    )
    assert declared.guarantee_tok_s == 30
    assert declared.declared_capacity is not None


def test_ports_must_be_ports_and_differ() -> None:
    assert Ports.from_environment({"BOOSTS_AGENT_PORT": "9003", "BOOSTS_STATS_PORT": ""}) == Ports(agent=9003)
    with pytest.raises(StackError, match="BOOSTS_STATS_PORT is 'x'"):
        Ports.from_environment({"BOOSTS_STATS_PORT": "x"})
    with pytest.raises(StackError, match="BOOSTS_CONTROL_PLANE_PORT and BOOSTS_AGENT_PORT are both 8003"):
        Ports.from_environment({"BOOSTS_CONTROL_PLANE_PORT": "8003"})


def test_all_taken_ports_are_told_at_once() -> None:
    with socket.socket() as first, socket.socket() as second:
        for taken in (first, second):
            taken.bind(("127.0.0.1", 0))
            taken.listen()
        ports = Ports(first.getsockname()[1], 1 + 2**15, second.getsockname()[1], 2 + 2**15)
        with pytest.raises(StackError) as told:
            ports.refuse_taken()
    assert "set BOOSTS_CONTROL_PLANE_PORT to a free one" in str(told.value)
    assert "set BOOSTS_STATS_PORT to a free one" in str(told.value)


# ---- what is made ----


class Said:
    """Collects what would be printed."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def __call__(self, line: str) -> None:
        self.lines.append(line)


def new_operator_key(control_plane: RunningControlPlane) -> str:
    command = [*control_plane.command, "--new-operator", "ops@example.com"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def keys_of(control_plane: RunningControlPlane, home: Path, said: Said) -> DemoKeys:
    return find_keys(home, control_plane.url, lambda: new_operator_key(control_plane), said)


def test_keys_are_kept_and_remade_only_when_they_are_lost(
    control_plane: RunningControlPlane, home: Path
) -> None:
    said = Said()
    keys = keys_of(control_plane, home, said)
    assert keys_of(control_plane, home, said) == keys
    assert (home / "demo-accounts.json").stat().st_mode & 0o777 == 0o600
    assert not said.lines
    (home / "demo-accounts.json").unlink()
    others = keys_of(control_plane, home, said)
    assert len({keys.operator, keys.customer, others.operator, others.customer}) == 4
    assert "the key of demo@localhost is lost" in said.lines[0]


def test_keys_of_another_database_are_replaced(control_plane: RunningControlPlane, home: Path) -> None:
    kept = {"operator": control_plane.new_customer(), "customer": "mk_unknown"}
    (home / "demo-accounts.json").write_text(json.dumps(kept))
    keys = keys_of(control_plane, home, Said())
    with Client(control_plane.url, keys.operator) as operator:
        operator.accounts()
    with Client(control_plane.url, keys.customer) as customer:
        customer.pools()


def test_pool_and_seats_are_made_once(control_plane: RunningControlPlane) -> None:
    said = Said()
    terms = demo_terms(None, {**POOL, "slug": f"pool-{uuid.uuid4()}"})
    with (
        control_plane.operator() as operator,
        Client(control_plane.url, control_plane.new_customer()) as customer,
    ):
        for _ in range(2):
            pool = open_pool(operator, terms, said)
            take_seats(customer, pool, said)
            assert pool["status"] == "funding"
        assert [pool["slug"] for pool in operator.admin_pools()].count(terms.slug) == 1
        pledge = find_pledge(customer, terms.slug)
        assert pledge is not None
        assert {hour["hour"] // 8 for hour in pledge["hours"]} == {0, 2}
    assert not said.lines


def test_an_open_pool_keeps_its_terms_and_that_is_told(control_plane: RunningControlPlane) -> None:
    said = Said()
    slug = f"pool-{uuid.uuid4()}"
    with control_plane.operator() as operator:
        pool = open_pool(operator, demo_terms(None, {**POOL, "slug": slug}), said)
        others = {**POOL, "slug": slug, "minSeats": 3, "engineArgs": ["--max-num-seqs", "8"]}
        assert open_pool(operator, demo_terms(None, others), said)["minSeats"] == pool["minSeats"]
    [line] = said.lines
    assert "minSeats, engineArgs" in line
    assert "choose another slug or BOOSTS_HOME" in line


def test_a_draft_that_an_earlier_run_left_is_opened_as_asked_now(control_plane: RunningControlPlane) -> None:
    said = Said()
    slug = f"pool-{uuid.uuid4()}"
    with control_plane.operator() as operator:
        operator.create_pool({**POOL, "slug": slug})
        pool = open_pool(operator, demo_terms(None, {**POOL, "slug": slug, "minSeats": 2}), said)
    assert (pool["status"], pool["minSeats"]) == ("funding", 2)
    assert not said.lines


def test_a_pool_without_free_seats_does_not_stop_the_stack(control_plane: RunningControlPlane) -> None:
    said = Said()
    terms = demo_terms(None, {**POOL, "slug": f"pool-{uuid.uuid4()}"})
    with (
        control_plane.operator() as operator,
        Client(control_plane.url, control_plane.new_customer()) as other,
    ):
        pool = open_pool(operator, terms, said)
        other.set_payment_method("pm_card_visa")
        other.subscribe(terms.slug, ["night"], 3)
        with Client(control_plane.url, control_plane.new_customer()) as customer:
            take_seats(customer, pool, said)
    [line] = said.lines
    assert line.startswith("the demo customer gets no seats: ")
