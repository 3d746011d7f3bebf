"""The agent whole: what a node does while its control plane orders, is away, freezes or errs."""

from __future__ import annotations

import asyncio
import json
import logging
import stat
from dataclasses import replace

import pytest

from agent.agent import FAILED, REPLACED, Ending
from contract.capacity import NodeCapacity
from contract.entitlements import parse_entitlements
from contract.nodes import GpuFigures, ServingState
from tests.contract.documents import measured
from tests.unit.agent.conftest import Node, alive, until
from tests.unit.agent.control_plane_stand_in import ControlPlane, orders

pytestmark = pytest.mark.slow


def errors(caplog: pytest.LogCaptureFixture, text: str) -> list[str]:
    return [record.getMessage() for record in caplog.records if text in record.getMessage()]


async def test_node_joins_once_and_keeps_its_identity_to_itself(
    node: Node, control_plane: ControlPlane
) -> None:
    async with node.agent():
        await until(lambda: control_plane.newest)
    async with node.agent(replace(node.options, join_token=None)):
        await until(lambda: control_plane.epoch == 2)
    assert control_plane.joined == 1
    assert stat.S_IMODE((node.home / "node.json").stat().st_mode) == 0o600


async def test_first_start_waits_for_a_control_plane_that_is_away(
    node: Node, control_plane: ControlPlane
) -> None:
    await control_plane.stop()
    async with node.agent():
        await asyncio.sleep(0.2)
        assert (await node.ask_agent("/healthz"))[0] == 200
        await control_plane.start()
        await until(lambda: control_plane.newest)


async def test_used_join_token_ends_the_agent_with_advice(
    node: Node, control_plane: ControlPlane, caplog: pytest.LogCaptureFixture
) -> None:
    control_plane.joined = 1
    async with node.agent() as running:
        assert await running.status == FAILED
    assert errors(caplog, "ask the pool's operator for a new one")


async def test_unknown_token_is_told_once_with_advice_and_serving_goes_on(
    node: Node, control_plane: ControlPlane, caplog: pytest.LogCaptureFixture
) -> None:
    control_plane.order(orders())
    async with node.agent():
        pid = await node.until_ready()
        control_plane.node_token = "another"
        asked = control_plane.asked
        await until(lambda: control_plane.asked > asked + 5)
        assert alive(pid)
    assert len(errors(caplog, "heartbeat: status 401")) == 1
    assert str(node.home / "node.json") in errors(caplog, "heartbeat: status 401")[0]


async def test_ordered_serving_runs_with_the_pools_model_and_flags(
    node: Node, control_plane: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BOOSTS_JOIN_TOKEN", control_plane.join_token)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    control_plane.order(orders())
    async with node.agent(replace(node.options, model="/models/x", engine_flags=("--enforce-eager",))):
        await node.until_ready()
        serving = await node.ask_serving()
        assert serving is not None
        argv = serving["argv"]
        assert argv[argv.index("--model") + 1] == "/models/x"
        assert argv[argv.index("--served-model-name") + 1] == "acme/small"
        assert argv[argv.index("--") :] == ["--", "--max-num-seqs", "8", "--enforce-eager"]
        assert serving["env"]["HF_HUB_OFFLINE"] == "1"
        assert "BOOSTS_JOIN_TOKEN" not in serving["env"]


async def test_heartbeat_tells_the_nodes_state(node: Node, control_plane: ControlPlane) -> None:
    control_plane.clock_ahead_s = 100.0
    node.plan(ready_after_s=0.3)
    async with node.agent():
        await until(lambda: control_plane.newest)
        control_plane.order(orders())
        await node.until_ready()
        await until(
            lambda: control_plane.newest is not None and control_plane.newest.serving is ServingState.READY
        )
        newest = control_plane.newest
        assert newest is not None
        assert (newest.model_id, newest.revision, newest.restarts, newest.problem) == (
            "acme/small",
            3,
            0,
            None,
        )
        assert newest.clock_offset_ms == pytest.approx(-100_000, abs=2000)
    states = [beat.serving for beat in control_plane.heartbeats]
    assert states[0] is ServingState.STOPPED
    assert ServingState.STARTING in states


async def test_heartbeat_tells_what_was_measured_before_until_serving_has_measured_itself(
    node: Node, control_plane: ControlPlane
) -> None:
    before = NodeCapacity.model_validate(measured(model_id="acme/small", slots=8))
    control_plane.order(orders())

    def slots() -> int | None:
        newest = control_plane.newest
        return None if newest is None or newest.capacity is None else newest.capacity.slots

    async with node.agent(replace(node.options, capacity=before)):
        pid = await node.until_ready()
        await until(lambda: slots() == 8)
        # Loaded from a folder, and the pool's model all the same.
        await node.tell(capacity=measured(model_id="/models/small", slots=4))
        await until(lambda: slots() == 4)
        assert control_plane.newest is not None
        assert control_plane.newest.capacity is not None
        assert control_plane.newest.capacity.model_id == "acme/small"
        # Another process may do less: what the last one measured is not told of it.
        await node.tell(exit=1)
        await node.until_ready(other_than=pid)
        await until(lambda: slots() == 8)


async def test_node_that_has_measured_nothing_tells_nothing(node: Node, control_plane: ControlPlane) -> None:
    control_plane.order(orders())
    async with node.agent():
        await node.until_ready()
        heard = len(control_plane.heartbeats)
        await until(lambda: len(control_plane.heartbeats) > heard + 1)
        assert all(beat.capacity is None for beat in control_plane.heartbeats)


async def test_change_of_state_is_told_at_once(node: Node, control_plane: ControlPlane) -> None:
    async with node.agent(heartbeat_s=60.0):
        await until(lambda: control_plane.newest)
        control_plane.order(orders())
        await until(
            lambda: control_plane.newest is not None and control_plane.newest.serving is ServingState.READY
        )


async def test_new_entitlements_reach_serving_without_a_restart(
    node: Node, control_plane: ControlPlane
) -> None:
    control_plane.order(orders())
    async with node.agent():
        pid = await node.until_ready()
        control_plane.order(orders(4))
        file = node.home / "entitlements.json"
        await until(lambda: parse_entitlements(file.read_bytes()).revision == 4)
        await until(lambda: control_plane.newest is not None and control_plane.newest.revision == 4)
        await until(lambda: any(r.entitlements_revision == 4 for r in control_plane.reports.values()))
        assert node.pid == pid


@pytest.mark.parametrize(
    "change", [{"model_id": "acme/large"}, {"engine_flags": ["--max-num-seqs", "16"]}], ids=["model", "flags"]
)
async def test_another_model_or_flag_means_a_drained_restart(
    node: Node, control_plane: ControlPlane, change: dict[str, object]
) -> None:
    control_plane.order(orders())
    async with node.agent():
        pid = await node.until_ready()
        await node.tell(drain_s=0.2, last_tokens=9)
        control_plane.order(orders(4, **change))
        await node.until_ready(other_than=pid)
        await until(lambda: control_plane.output_tokens() == 9)
        newest = control_plane.newest
        assert newest is not None
        assert newest.restarts == 0
    assert ServingState.DRAINING in [beat.serving for beat in control_plane.heartbeats]


async def test_serve_false_drains_and_stops(node: Node, control_plane: ControlPlane) -> None:
    control_plane.order(orders())
    async with node.agent():
        pid = await node.until_ready()
        control_plane.order(orders(4, serve=False))
        await until(lambda: not alive(pid))
        await until(
            lambda: control_plane.newest is not None and control_plane.newest.serving is ServingState.STOPPED
        )
        assert not (node.home / "serving.json").exists()
        status, text = await node.ask_agent("/readyz")
        assert status == 503
        assert json.loads(text)["serving"] == "stopped"


async def test_node_serves_from_its_disk_while_the_control_plane_is_away(
    node: Node, control_plane: ControlPlane
) -> None:
    control_plane.order(orders())
    async with node.agent() as running:
        await node.until_ready()
        running.agent.ask(Ending.STOP)
        assert await running.status == 0
    assert not node.servings()
    await control_plane.stop()
    async with node.agent():
        await node.until_ready()
        await node.tell(output_tokens=12)
        beats, epoch = len(control_plane.heartbeats), control_plane.epoch
        await control_plane.start()
        await until(lambda: len(control_plane.heartbeats) > beats)
        await until(lambda: control_plane.output_tokens() == 12)
        assert control_plane.epoch == epoch + 1


async def test_frozen_control_plane_costs_no_report(node: Node, control_plane: ControlPlane) -> None:
    control_plane.order(orders())
    async with node.agent(call_s=0.5, report_s=0.1):
        pid = await node.until_ready()
        await until(lambda: control_plane.reports)
        control_plane.thawed.clear()
        for tokens in (10, 20, 30):
            await node.tell(output_tokens=tokens)
            await node.until_looked_at()
            spooled = await spooled_reports(node)
            while await spooled_reports(node) < spooled + 2:  # noqa: ASYNC110 - a port is asked
                await asyncio.sleep(0.02)
        assert await node.ready()
        control_plane.thawed.set()
        await until(lambda: control_plane.output_tokens() == 30)
        assert node.pid == pid
    reported = {seat.output_tokens for report in control_plane.reports.values() for seat in report.seats}
    assert reported >= {10, 20, 30}


async def spooled_reports(node: Node) -> float:
    return float(metric((await node.ask_agent("/metrics"))[1], "boosts_agent_spooled_reports"))


def metric(text: str, name: str) -> str:
    [line] = [line for line in text.splitlines() if line.startswith(f"{name} ")]
    return line.split()[1]


@pytest.mark.parametrize(
    "answer",
    ["<html>", '{"success": true, "data": {"version": 9}}'],
    ids=["html", "fields"],
)
async def test_invalid_orders_are_told_once_and_the_last_good_ones_stay(
    node: Node, control_plane: ControlPlane, caplog: pytest.LogCaptureFixture, answer: str
) -> None:
    control_plane.order(orders())
    async with node.agent():
        pid = await node.until_ready()
        control_plane.garbage["orders"] = answer
        control_plane.order(orders(4, serve=False))
        asked = control_plane.asked
        await until(lambda: control_plane.asked > asked + 10)
        assert alive(pid)
        assert len(errors(caplog, "orders: refused an answer")) == 1
        del control_plane.garbage["orders"]
        await until(lambda: not alive(pid))


async def test_older_orders_are_told_once_and_refused(
    node: Node, control_plane: ControlPlane, caplog: pytest.LogCaptureFixture
) -> None:
    control_plane.order(orders(5))
    async with node.agent():
        pid = await node.until_ready()
        answer = orders(4, serve=False).model_dump_json()
        control_plane.garbage["orders"] = f'{{"success": true, "data": {answer}}}'
        asked = control_plane.asked
        control_plane.order(orders(6))
        await until(lambda: control_plane.asked > asked + 10)
        assert alive(pid)
        assert len(errors(caplog, "revision 4 is not newer than 5")) == 1


async def test_same_orders_again_are_not_asked_for_in_a_circle(
    node: Node, control_plane: ControlPlane
) -> None:
    control_plane.order(orders())
    async with node.agent(heartbeat_s=60.0, retry_first_s=0.2, retry_most_s=0.2):
        await node.until_ready()
        answer = orders().model_dump_json()
        control_plane.garbage["orders"] = f'{{"success": true, "data": {answer}}}'
        control_plane.order(orders(4, serve=False))
        asked = control_plane.asked
        await asyncio.sleep(0.6)
        assert control_plane.asked - asked < 12


async def test_replaced_agent_ends_with_3_and_leaves_serving(
    node: Node, control_plane: ControlPlane, caplog: pytest.LogCaptureFixture
) -> None:
    control_plane.order(orders())
    async with node.agent() as running:
        pid = await node.until_ready()
        control_plane.epoch += 1
        assert await running.status == REPLACED
        assert alive(pid)
    assert errors(caplog, "another agent has taken over this node")


async def test_replaced_agent_that_was_asked_to_stop_still_stops_serving(
    node: Node, control_plane: ControlPlane
) -> None:
    control_plane.order(orders())
    async with node.agent() as running:
        pid = await node.until_ready()
        await node.tell(drain_s=0.2)
        running.agent.ask(Ending.STOP)
        control_plane.epoch += 1
        assert await running.status == 0
        assert not alive(pid)


async def test_stop_reports_the_last_token_before_it_ends(node: Node, control_plane: ControlPlane) -> None:
    control_plane.order(orders())
    async with node.agent(report_s=1000.0) as running:
        pid = await node.until_ready()
        await node.tell(output_tokens=40, drain_s=0.3, last_tokens=2)
        running.agent.ask(Ending.STOP)
        running.agent.ask(Ending.STOP)
        assert await running.status == 0
        assert not alive(pid)
    assert control_plane.output_tokens() == 42
    assert control_plane.newest is not None
    assert control_plane.newest.serving is ServingState.STOPPED
    assert control_plane.newest.spooled_reports == 0


async def test_stop_does_not_wait_for_a_frozen_control_plane(node: Node, control_plane: ControlPlane) -> None:
    control_plane.order(orders())
    async with node.agent(farewell_s=0.1, call_s=60.0) as running:
        await node.until_ready()
        control_plane.thawed.clear()
        running.agent.ask(Ending.STOP)
        assert await asyncio.wait_for(running.status, 5) == 0


async def test_lost_orders_leave_running_serving_alone(node: Node, control_plane: ControlPlane) -> None:
    control_plane.order(orders())
    async with node.agent():
        pid = await node.until_ready()
    for name in ("orders.json", "orders.previous.json"):
        (node.home / name).unlink(missing_ok=True)
    await control_plane.stop()
    async with node.agent():
        await asyncio.sleep(0.3)
        assert alive(pid)
        await control_plane.start()
        await node.until_ready()
        assert node.pid == pid


async def test_defect_of_the_agent_leaves_serving_running(
    node: Node, control_plane: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    control_plane.order(orders())
    async with node.agent() as running:
        pid = await node.until_ready()
        monkeypatch.setattr("agent.reporter.Reporter.send_some", None)
        with pytest.raises(ExceptionGroup):
            await running.status
        assert alive(pid)


async def test_metrics_and_health_tell_the_nodes_state(
    node: Node, control_plane: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = GpuFigures(
        name="H100",
        memory_used_bytes=10,
        memory_total_bytes=80,
        utilization_percent=50,
        power_watts=300.0,
        temperature_celsius=40,
    )
    monkeypatch.setattr("agent.gpu.GpuWatch.start", lambda watch: None)
    monkeypatch.setattr("agent.gpu.GpuWatch.figures", (gpu, gpu))
    control_plane.order(orders())
    async with node.agent():
        await node.until_ready()
        await until(lambda: control_plane.reports)
        assert (await node.ask_agent("/healthz"))[0] == 200
        text = (await node.ask_agent("/metrics"))[1]
        await until(lambda: control_plane.newest is not None and len(control_plane.newest.gpus) == 2)
    assert metric(text, "boosts_agent_serving_ready") == "1.0"
    assert metric(text, "boosts_agent_orders_revision") == "3.0"
    assert float(metric(text, "boosts_agent_control_plane_contact_age_seconds")) < 5
    assert metric(text, 'boosts_agent_gpu_utilization_ratio{gpu="1"}') == "0.5"
    assert metric(text, "boosts_agent_serving_restarts_total") == "0.0"
    assert "boosts_agent_sent_reports_total" in text
    assert "boosts_agent_clock_offset_seconds" in text


async def test_damaged_identity_is_told_with_advice(node: Node) -> None:
    (node.home / "node.json").write_text("{")
    with pytest.raises(Exception, match="with a new --join-token"):
        async with node.agent():
            pass


@pytest.fixture(autouse=True)
def log_level(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


async def test_older_copy_of_the_control_planes_database_means_registering_again(
    node: Node, control_plane: ControlPlane
) -> None:
    control_plane.order(orders())
    async with node.agent():
        pid = await node.until_ready()
        control_plane.epoch, control_plane.boot_id = 0, ""
        await until(lambda: control_plane.epoch == 1)
        beats = len(control_plane.heartbeats)
        await until(lambda: len(control_plane.heartbeats) > beats)
        assert control_plane.heartbeats[-1].epoch == 1
        assert alive(pid)
