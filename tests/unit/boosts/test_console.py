"""Where a command looks for its control plane and its key, and what it says when nobody answers there."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from boosts.client import Throughput
from boosts.console import THROUGHPUT_COLUMNS, throughput_cells
from boosts.demo_file import DemoFile
from contract.keys import KeyKind, new_key
from tests.unit.boosts.conftest import RunningControlPlane, bad, boosts, good

pytestmark = pytest.mark.slow


def demo(url: str, operator: str, customer: str) -> DemoFile:
    return DemoFile(
        control_plane_url=url,
        operator_key=operator,
        customer_key=customer,
        pool_slug="demo",
        inference_url="http://127.0.0.1:8001",
        boost_key=None,
        model="demo",
        model_path="/demo",
        stats_url="http://127.0.0.1:8002",
        agent_url="http://127.0.0.1:8003",
    )


def test_demo_json_gives_address_and_keys(control_plane: RunningControlPlane, home: Path) -> None:
    demo(control_plane.url, control_plane.operator_key, control_plane.new_customer()).write(home)
    good(boosts("pools", "list"))
    good(boosts("admin", "accounts", "list"))


def test_demo_keys_are_not_sent_to_other_control_planes(home: Path) -> None:
    key = new_key(KeyKind.MANAGEMENT)
    demo("http://127.0.0.1:1", key, key).write(home)
    assert "no management key" in bad(boosts("pools", "list", "--url", "http://127.0.0.1:2"))


def test_a_damaged_demo_json_counts_as_none(home: Path) -> None:
    (home / "demo.json").write_text("{")
    assert "no management key" in bad(boosts("pools", "list"))


def test_demo_json_is_its_owners_alone_and_keeps_its_fields(home: Path) -> None:
    demo("http://127.0.0.1:1", "mk_operator", "mk_customer").write(home)
    assert (home / "demo.json").stat().st_mode & 0o777 == 0o600
    assert set(json.loads((home / "demo.json").read_text())) == {
        *("control_plane_url", "operator_key", "customer_key", "pool_slug", "inference_url", "boost_key"),
        *("model", "model_path", "stats_url", "agent_url"),
    }


def test_nobody_at_the_address_is_one_line_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BOOSTS_MANAGEMENT_KEY", new_key(KeyKind.MANAGEMENT))
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{reserved.getsockname()[1]}"
        said = bad(boosts("pools", "list", "--url", url))
    assert said.startswith(f"boosts pools list: no control plane answers at {url}")
    assert "want http://" in bad(boosts("pools", "list", "--url", "pools.example.com"))


def test_help_answers_at_once() -> None:
    began = time.monotonic()
    command = [sys.executable, "-m", "boosts", "--help"]
    said = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ})
    # Half a second on an idle machine; the tests' machine is not one.
    assert time.monotonic() - began < 2
    for name in ("run", "control-plane", "node", "serve", "bench", "keys", "pools", "billing", "admin"):
        assert f"\n  {name} " in said.stdout


@pytest.mark.parametrize(
    ("command", "program"),
    [("control-plane", "boosts control-plane"), ("node", "boosts node"), ("serve", "boosts serve")],
)
def test_programs_with_a_parser_of_their_own_get_their_arguments(command: str, program: str) -> None:
    said = subprocess.run(
        [sys.executable, "-m", "boosts", command, "--help"], capture_output=True, text=True, check=True
    )
    assert said.stdout.startswith(f"usage: {program} ")


def test_throughput_stands_under_its_columns() -> None:
    figures: Throughput = {
        "requests": 3,
        "inputTokens": 120,
        "owedTokens": 499.6,
        "deliveredTokens": 620,
        "borrowedTokens": 121.0,
        "heldS": 0.25,
        "owedSeconds": 60,
        "missedSeconds": 1,
        "attainment": 0.999,
        "attainment1s": 0.9,
        "attainment10s": None,
        "attainment60s": 1.0,
    }
    shown = dict(zip(THROUGHPUT_COLUMNS, throughput_cells(figures), strict=True))
    assert (shown["OWED OUT"], shown["LOWEST 1 S"], shown["10 S"]) == ("500", "90.0%", "-")
    assert shown["SECONDS KEPT"] == "59 of 60"
