"""What a node tells its agent of each seat."""

from __future__ import annotations

import socket

import aiohttp

from contract.reports import ThroughputReport, parse_report
from scheduler import Ask
from serving.node import Node, StepOutput, Verdict
from serving.stats import StatsServer
from tests.unit.test_node import Caller, node_with, pledge, settle


async def report_of(node: Node) -> ThroughputReport:
    server = StatsServer(node, engine_alive=lambda: True, listening=lambda: True)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/stats"
        await server.start(listener)
        try:
            async with aiohttp.ClientSession() as session, session.get(url) as answer:
                return parse_report(await answer.read())
        finally:
            await server.stop()


async def test_a_report_tells_the_seconds_that_a_seat_was_owed_and_those_it_missed() -> None:
    node, clocks = node_with(pledge())
    caller = Caller(node, Verdict(pledge()), Ask(input_tokens=10, max_tokens=500))
    await settle()
    assert caller.ticket_id is not None
    for second in range(10):
        # 5 tokens a second are owed.
        node.record_step([StepOutput(caller.ticket_id, 4 if second in (3, 7) else 5, 0)], [], clocks.now)
        clocks.advance(1.0)
    clocks.advance(1.0)
    [seat] = (await report_of(node)).seats
    assert (seat.owed_seconds, seat.missed_seconds) == (10, 2)
    assert (seat.output_tokens, seat.attainment_1s) == (48, 0.8)
    caller.leave.set()
    await settle()
