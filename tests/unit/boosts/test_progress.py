"""What `boosts run` prints while it works, and for pasting."""

from __future__ import annotations

import os
import shlex
import time
from pathlib import Path

import pytest

from boosts.client import AdminPool
from boosts.progress import Progress, engine_stage
from boosts.welcome import funding_message


def test_a_log_gets_a_line_for_each_change(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress()
    for stage in ("loading", "loading", "warming up"):
        progress.show(stage)
    progress.say("ready")
    progress.show("loading")
    assert capsys.readouterr().out == "loading\nwarming up\nready\nloading\n"


def test_the_stage_is_the_furthest_that_this_runs_log_shows(tmp_path: Path) -> None:
    log = tmp_path / "serving.log"
    began = time.time()
    assert engine_stage(log, began) == "starting vLLM"
    log.write_text("Starting to load model\nLoading weights took 1 s\n")
    os.utime(log, (began + 1, began + 1))
    assert engine_stage(log, began) == "preparing the engine"
    os.utime(log, (began - 1, began - 1))
    assert engine_stage(log, began) == "starting vLLM"


@pytest.mark.parametrize(
    ("pledged", "wanted", "seats", "quantity"), [(3, 12, 20, "9"), (3, 40, 30, "20"), (3, 30, 10, "9")]
)
def test_the_way_to_a_live_pool_can_be_pasted(pledged: int, wanted: int, seats: int, quantity: str) -> None:
    pool: AdminPool = {
        "id": "1",
        "slug": "demo",
        "modelId": "demo",
        "modelName": "Demo",
        "status": "funding",
        "blocks": {"europe": {"seats": seats, "monthlyPrice": "27.00"}},
        "minSeats": wanted,
        "guaranteeTokS": 20,
        "nodes": 1,
        "feasibility": None,
        "activationProblem": None,
        "alarms": [],
        "attainment60s": None,
        "pledgedSlots": pledged,
    }
    said = funding_message(pool, Path("/a home"))
    assert said.startswith(f"pool demo is funding: {pledged} of {wanted} seats; ")
    [subscribe] = [line for line in said.splitlines() if " pools subscribe " in line]
    setting, program, *arguments = shlex.split(subscribe)
    assert setting == "BOOSTS_HOME=/a home"
    assert program.endswith("/boosts")
    assert arguments == ["pools", "subscribe", "demo", "--block", "europe", "--quantity", quantity]
