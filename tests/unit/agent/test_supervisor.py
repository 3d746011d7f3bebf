"""Serving that ends, hangs or is found running: restarted when it must be, left alone when it may be."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from dataclasses import replace

import pytest

from agent.agent import Ending
from agent.process import Record
from agent.supervisor import wait
from contract.nodes import Heartbeat, ServingState
from tests.unit.agent.conftest import Node, alive, until
from tests.unit.agent.control_plane_stand_in import ControlPlane, orders

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def ordered(control_plane: ControlPlane, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    control_plane.order(orders())


def failures(control_plane: ControlPlane) -> list[Heartbeat]:
    return [beat for beat in control_plane.heartbeats if beat.serving is ServingState.FAILED]


@pytest.mark.parametrize("turns", range(4))
async def test_cancellation_that_comes_with_the_event_is_not_lost(turns: int) -> None:
    event = asyncio.Event()
    waiting = asyncio.create_task(wait(event, 60.0))
    for _ in range(3):
        await asyncio.sleep(0)
    event.set()
    for _ in range(turns):
        await asyncio.sleep(0)
    accepted = waiting.cancel()
    await asyncio.wait([waiting])
    assert waiting.cancelled() == accepted


async def test_serving_that_dies_is_started_again_and_the_reason_told(
    node: Node, control_plane: ControlPlane
) -> None:
    async with node.agent(report_s=1000.0, restart_first_s=0.3):
        pid = await node.until_ready()
        await node.tell(output_tokens=40)
        await node.until_looked_at()
        await node.tell(exit=9)
        assert await node.until_ready(other_than=pid)
        # Spooled at its end: at most what it made since the last look is lost.
        await until(lambda: control_plane.output_tokens() == 40)
        await until(
            lambda: control_plane.newest is not None and control_plane.newest.serving is ServingState.READY
        )
    failure = failures(control_plane)[0]
    assert failure.model_id == "acme/small"
    assert failure.problem is not None
    assert failure.problem.splitlines()[0] == "serving ended with status 9"
    assert failure.problem.splitlines()[-1] == "the engine has died"
    assert control_plane.heartbeats[-1].restarts == 1
    assert control_plane.heartbeats[-1].problem is None


async def test_serving_that_cannot_start_is_tried_less_and_less_often(
    node: Node, control_plane: ControlPlane, caplog: pytest.LogCaptureFixture
) -> None:
    node.plan(exit=1)
    async with node.agent():
        await until(lambda: caplog.text.count("starting it again in") >= 4)
        delays = [part.split(" s.")[0] for part in caplog.text.split("starting it again in ")[1:]]
        assert delays[:4] == ["0.05", "0.1", "0.2", "0.2"]
        status, text = await node.ask_agent("/readyz")
        assert status == 503
        assert "out of GPU memory" in json.loads(text)["problem"]
        assert (await node.ask_agent("/healthz"))[0] == 200


async def test_serving_that_was_ready_for_long_is_started_again_without_delay(
    node: Node, caplog: pytest.LogCaptureFixture
) -> None:
    async with node.agent(restart_forgiven_s=0.1):
        pid = await node.until_ready()
        for _ in range(2):
            await asyncio.sleep(0.1)
            await node.tell(exit=1)
            pid = await node.until_ready(other_than=pid)
    assert caplog.text.count("starting it again in 0.05 s") == 2


async def test_other_orders_are_tried_at_once(node: Node, control_plane: ControlPlane) -> None:
    node.plan(exit=1)
    async with node.agent(restart_first_s=60.0, restart_most_s=60.0):
        await until(lambda: failures(control_plane))
        node.plan()
        control_plane.order(orders(4, engine_flags=["--max-model-len", "100"]))
        await node.until_ready()


async def test_program_that_is_not_there_is_told(node: Node, control_plane: ControlPlane) -> None:
    async with node.agent(replace(node.options, serving=("/no/such/program",))):
        await until(lambda: failures(control_plane))
    assert "/no/such/program" in str(failures(control_plane)[0].problem)


async def test_serving_that_answers_no_more_is_restarted(node: Node, control_plane: ControlPlane) -> None:
    async with node.agent(silence_s=0.3, look_s=0.1, kill_s=0.2):
        pid = await node.until_ready()
        await node.tell(silent=True, deaf=True)
        await node.until_ready(other_than=pid)
    assert "has not answered for 0.3 s" in str(failures(control_plane)[0].problem)


async def test_serving_that_is_slow_to_load_is_left_alone(node: Node) -> None:
    node.plan(silent=True)
    async with node.agent(silence_s=0.3, look_s=0.1):
        await until(lambda: len(node.servings()) == 1)
        pid = node.pid
        await asyncio.sleep(0.7)
        assert alive(pid)
        await node.tell(silent=False)
        assert await node.until_ready() == pid


async def test_engine_that_makes_no_token_with_work_in_flight_is_restarted(
    node: Node, control_plane: ControlPlane
) -> None:
    async with node.agent(stall_s=0.3):
        pid = await node.until_ready()
        await node.tell(in_flight=1)
        await node.until_ready(other_than=pid)
    assert "made no token for 0.3 s" in str(failures(control_plane)[0].problem)


async def test_busy_serving_is_left_alone(node: Node) -> None:
    async with node.agent(stall_s=0.3):
        pid = await node.until_ready()
        await node.tell(in_flight=1, tokens_per_look=1)
        await asyncio.sleep(0.8)
        assert node.pid == pid
        assert alive(pid)


async def test_answer_that_fails_once_does_not_make_the_node_unready(
    node: Node, control_plane: ControlPlane
) -> None:
    async with node.agent(doubt_s=60.0, look_s=0.2):
        await node.until_ready()
        await until(lambda: control_plane.newest and control_plane.newest.serving is ServingState.READY)
        beats = len(control_plane.heartbeats)
        await node.tell(silent=True)
        await asyncio.sleep(0.5)
        assert await node.ready()
    assert {beat.serving for beat in control_plane.heartbeats[beats:]} == {ServingState.READY}


async def test_serving_that_is_not_ready_any_more_is_told_with_its_reason(
    node: Node, control_plane: ControlPlane
) -> None:
    async with node.agent():
        pid = await node.until_ready()
        await node.tell(ready_after_s=1e9)
        await until(lambda: str(control_plane.heartbeats[-1].problem).endswith("is not any more: starting"))
        status, _ = await node.ask_agent("/readyz")
        assert status == 503
        assert alive(pid)


async def test_serving_that_does_not_drain_in_time_is_killed(node: Node, control_plane: ControlPlane) -> None:
    async with node.agent(replace(node.options, drain_s=0), kill_s=0.2) as running:
        pid = await node.until_ready()
        await node.tell(deaf=True)
        running.agent.ask(Ending.STOP)
        assert await running.status == 0
        assert not alive(pid)


async def test_next_agent_adopts_serving_as_it_runs(node: Node, control_plane: ControlPlane) -> None:
    async with node.agent() as running:
        pid = await node.until_ready()
        running.agent.ask(Ending.HAND_OVER)
        assert await running.status == 0
        assert alive(pid)
    async with node.agent():
        assert await node.until_ready() == pid
        await node.tell(output_tokens=7)
        await until(lambda: control_plane.output_tokens() == 7)
        os.kill(pid, signal.SIGKILL)
        assert await node.until_ready(other_than=pid)
    assert control_plane.heartbeats[-1].restarts == 1


async def test_adopted_serving_that_was_started_otherwise_is_drained_and_restarted(node: Node) -> None:
    async with node.agent():
        pid = await node.until_ready()
    async with node.agent(replace(node.options, engine_flags=("--enforce-eager",))):
        assert await node.until_ready(other_than=pid)
        serving = await node.ask_serving()
        assert serving is not None
        assert "--enforce-eager" in serving["argv"]


async def test_adopted_serving_that_hangs_is_restarted(node: Node) -> None:
    async with node.agent():
        pid = await node.until_ready()
        await node.tell(silent=True, deaf=True)
    async with node.agent(silence_s=0.3, look_s=0.1, kill_s=0.2):
        assert await node.until_ready(other_than=pid)


async def test_serving_that_died_without_an_agent_is_started_again(node: Node) -> None:
    async with node.agent():
        pid = await node.until_ready()
    os.kill(pid, signal.SIGKILL)
    async with node.agent():
        assert await node.until_ready(other_than=pid)


async def test_process_that_got_servings_number_is_not_touched(node: Node) -> None:
    stranger = await asyncio.create_subprocess_exec("sleep", "60", process_group=0)
    try:
        async with node.agent():
            await node.until_ready()
            path = node.home / "serving.json"
            record = Record.parse(path.read_bytes(), "record")
        for serving in node.servings():
            serving.kill()
        path.write_text(record.model_copy(update={"pid": stranger.pid}).model_dump_json())
        async with node.agent():
            assert await node.until_ready() != stranger.pid
        assert stranger.returncode is None
    finally:
        stranger.kill()
        await stranger.wait()
