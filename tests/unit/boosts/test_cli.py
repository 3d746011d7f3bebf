"""Commands with a parser of their own get what was typed, the double dash included."""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest

from tests.unit.boosts.conftest import boosts

TYPED = ["--model", "m", "-h", "--", "--max-num-seqs", "8"]


@pytest.mark.parametrize(
    ("command", "module"),
    [("node", "agent.main"), ("serve", "serving.main"), ("control-plane", "control_plane.main")],
)
def test_programs_get_their_arguments_as_they_were_typed(
    command: str, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    became: list[list[str]] = []

    def become(path: str, arguments: list[str]) -> Any:
        became.append(arguments)
        raise SystemExit(0)

    monkeypatch.setattr(os, "execv", become)
    assert boosts(command, *TYPED).exit_code == 0
    assert became == [[sys.executable, "-m", module, *TYPED]]


def test_capacity_tells_its_options_without_building_a_model() -> None:
    said = boosts("capacity", "--help")
    assert said.exit_code == 0
    assert "boosts capacity --model Qwen/Qwen3-8B" in said.stdout
