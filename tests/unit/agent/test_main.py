"""`python -m agent.main` as a process: options, signals, and serving that outlives it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
from asyncio.subprocess import Process
from pathlib import Path

import pytest

from agent.main import parse
from contract.keys import KeyKind, new_key
from tests.contract.documents import measured
from tests.unit.agent.conftest import Node, alive, until
from tests.unit.agent.control_plane_stand_in import ControlPlane, orders

pytestmark = pytest.mark.slow


async def ended(agent: Process) -> tuple[int, str]:
    output, _ = await asyncio.wait_for(agent.communicate(), 8)
    assert agent.returncode is not None
    return agent.returncode, output.decode()


async def test_killed_agent_leaves_serving_to_the_next_one(node: Node, control_plane: ControlPlane) -> None:
    control_plane.order(orders())
    first = await node.start_process()
    pid = await node.until_ready()
    assert os.getpgid(pid) == pid
    await node.tell(output_tokens=5)
    first.send_signal(signal.SIGKILL)
    await first.wait()
    assert alive(pid)
    await node.tell(output_tokens=9)
    second = await node.start_process()
    assert await node.until_ready() == pid
    await until(lambda: control_plane.epoch == 2)
    assert len(node.servings()) == 1
    second.send_signal(signal.SIGTERM)
    # Impatience changes nothing.
    second.send_signal(signal.SIGINT)
    second.send_signal(signal.SIGTERM)
    assert (await ended(second))[0] == 0
    assert not alive(pid)
    assert control_plane.output_tokens() == 9


async def test_sigusr2_hands_serving_over(node: Node, control_plane: ControlPlane) -> None:
    control_plane.order(orders())
    first = await node.start_process()
    pid = await node.until_ready()
    first.send_signal(signal.SIGUSR2)
    assert (await ended(first))[0] == 0
    assert alive(pid)
    await node.start_process()
    assert await node.until_ready() == pid


async def test_replaced_agent_exits_with_3_and_says_why(node: Node, control_plane: ControlPlane) -> None:
    control_plane.order(orders())
    agent = await node.start_process()
    pid = await node.until_ready()
    control_plane.epoch += 1
    control_plane.order(orders(4))
    status, output = await ended(agent)
    assert status == 3
    assert "another agent has taken over this node" in output
    assert alive(pid)


async def test_second_agent_of_a_home_is_refused(node: Node, control_plane: ControlPlane) -> None:
    await node.start_process()
    await until(lambda: control_plane.newest)
    status, output = await ended(await node.start_process())
    assert status == 1
    assert output == f"boosts node: another agent runs in {node.home}; stop it, or give --home\n"


async def test_taken_port_is_told_before_anything_else(node: Node, control_plane: ControlPlane) -> None:
    with socket.create_server(("127.0.0.1", node.agent_port)):
        status, output = await ended(await node.start_process())
    assert status == 1
    assert f"cannot listen on 127.0.0.1:{node.agent_port}" in output
    assert control_plane.asked == 0


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("BOOSTS_CONTROL_PLANE_URL", "BOOSTS_JOIN_TOKEN", "BOOSTS_HOME"):
        monkeypatch.delenv(name, raising=False)


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as caught:
        parse(list(argv))
    assert caught.value.code == 2
    return capsys.readouterr().err


@pytest.mark.usefixtures("bare")
def test_wrong_options_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    url = ("--control-plane", "http://cp")
    assert "BOOSTS_CONTROL_PLANE_URL" in refusal(capsys)
    assert "not an http" in refusal(capsys, "--control-plane", "cp:8000")
    assert "mistyped" in refusal(capsys, *url, "--join-token", new_key(KeyKind.JOIN)[:-1] + "!")
    assert "--base-url is needed" in refusal(capsys, *url, "--host", "::")
    assert "must differ" in refusal(capsys, *url, "--port", "8002")
    assert "not a port" in refusal(capsys, *url, "--port", "65536")


def test_options_come_from_the_environment_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    token = new_key(KeyKind.JOIN)
    monkeypatch.setenv("BOOSTS_CONTROL_PLANE_URL", "https://cp")
    monkeypatch.setenv("BOOSTS_JOIN_TOKEN", token)
    monkeypatch.setenv("BOOSTS_HOME", str(tmp_path))
    options = parse([])
    assert (options.control_plane, options.join_token, options.home) == ("https://cp", token, tmp_path)


@pytest.mark.usefixtures("bare")
def test_defaults_and_local_flags(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    options = parse(["--control-plane", "http://cp", "--model", "weights", "--", "--max-num-seqs", "4"])
    assert options.home == tmp_path / "var/node"
    assert options.base_url == "http://127.0.0.1:8001"
    assert options.model == str(tmp_path / "weights")
    assert options.engine_flags == ("--max-num-seqs", "4")
    assert (options.drain_s, options.pace.silence_s, options.pace.stall_s) == (60, 120.0, 300.0)


@pytest.mark.usefixtures("bare")
def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "usage: boosts node" in text
    assert "--join-token join_" in text


def test_a_measured_capacity_is_read_from_its_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "capacity.json"
    asked = ["--control-plane", "http://cp", "--capacity", str(file)]
    file.write_text(json.dumps(measured()))
    capacity = parse(asked).capacity
    assert capacity is not None
    assert capacity.slots == 256
    file.write_text(json.dumps(measured(slots=0)))
    for path, told in ((file, "capacity: slots"), (tmp_path / "none", "No such file")):
        with pytest.raises(SystemExit):
            parse([*asked[:-1], str(path)])
        assert told in capsys.readouterr().err
