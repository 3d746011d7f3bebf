"""No pool opens or goes live with more seats than its nodes can honour, and what is lost later is told."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from sqlalchemy import update

from contract.nodes import ServingState
from control_plane.nodes.tables import Node
from control_plane.throughput.tables import ThroughputMinute
from tests.contract.documents import capacity, measured
from tests.unit.control_plane.market import (
    FEE_CENTS,
    Customer,
    Market,
    empty_ground,  # noqa: F401 - a fixture
    on_sqlite_only,
    open_market,  # noqa: F401 - a fixture
)

pytestmark = pytest.mark.slow

NIGHT = {"night": (12, "27.00")}


async def buyers(market: Market, pool_id: str, count: int, *blocks: str, quantity: int = 1) -> list[Customer]:
    made = [await market.customer() for _ in range(count)]
    for customer in made:
        _ = (await customer.subscribe(pool_id, *blocks, quantity=quantity)).data
    return made


async def shown(market: Market, pool_id: str) -> dict[str, Any]:
    data: dict[str, Any] = (await market.operate("GET", f"/pools/{pool_id}")).data
    return data


async def tell(market: Market, node_id: str, told: dict[str, Any] | None) -> None:
    """The node has measured itself anew."""
    async with market.database.write() as session:
        await session.execute(update(Node).where(Node.id == node_id).values(capacity=told))


async def codes(market: Market, pool_id: str) -> list[str]:
    return [alarm["code"] for alarm in (await shown(market, pool_id))["alarms"]]


# --- opening -----------------------------------------------------------------------------------------


@on_sqlite_only
async def test_a_pool_with_a_guarantee_is_not_opened_blind(market: Market) -> None:
    pool_id = await market.draft(declared_capacity=None)
    answer = await market.operate("POST", f"/pools/{pool_id}/open")
    assert answer.refusal == (409, "capacity_undeclared")
    assert "boosts capacity" in answer.error["message"]
    assert await market.status(pool_id) == "draft"
    # Where nothing is promised there is nothing to keep.
    free = await market.draft(declared_capacity=None, guarantee_tok_s=0)
    assert (await market.operate("POST", f"/pools/{free}/open")).data["status"] == "funding"
    assert (await market.operate("PATCH", f"/pools/{pool_id}", {"declaredCapacity": capacity()})).data
    assert (await market.operate("POST", f"/pools/{pool_id}/open")).data["status"] == "funding"


@on_sqlite_only
async def test_a_pool_is_not_opened_with_more_seats_than_the_declared_capacity_honours(
    market: Market,
) -> None:
    blocks = {"night": (3, "27.00"), "europe": (12, "27.00")}
    pool_id = await market.draft(blocks=blocks, declared_capacity=capacity(slots=8))
    answer = await market.operate("POST", f"/pools/{pool_id}/open")
    assert answer.refusal == (409, "not_feasible")
    details = answer.error["details"]
    assert (details["block"], details["seats"], details["mostSeats"]) == ("europe", 12, 8)
    assert details["fails"] == ["slots"]
    assert details["stepNeededMs"] < details["stepAllowedMs"] == 18.0
    assert "12 of 8 slots" in answer.error["message"]
    assert await market.status(pool_id) == "draft"


@on_sqlite_only
async def test_each_node_is_judged_by_its_share_of_the_fullest_block(market: Market) -> None:
    eight_each = capacity(slots=8)
    pool_id = await market.draft(blocks={"night": (17, "27.00")}, declared_capacity=eight_each, nodes=2)
    answer = await market.operate("POST", f"/pools/{pool_id}/open")
    assert answer.refusal == (409, "not_feasible")
    assert (answer.error["details"]["seats"], answer.error["details"]["nodes"]) == (9, 2)
    _ = (await market.operate("PATCH", f"/pools/{pool_id}", {"nodes": 3})).data
    assert (await market.operate("POST", f"/pools/{pool_id}/open")).data["feasibility"]["seats"] == 6


@on_sqlite_only
async def test_context_and_margin_are_counted_as_the_terms_say(market: Market) -> None:
    small = capacity(kv_tokens=12 * 2048)
    pool_id = await market.draft(blocks=NIGHT, declared_capacity=small)
    assert (await shown(market, pool_id))["feasibility"]["fits"]
    for changes, bound in (
        ({"contextTokens": 2049}, "kv_tokens"),
        ({"contextTokens": 2048, "capacityMargin": 0.99}, "step_time"),
    ):
        edited = (await market.operate("PATCH", f"/pools/{pool_id}", changes)).data
        assert edited["feasibility"]["fails"] == [bound]


@on_sqlite_only
async def test_a_capacity_of_another_model_is_not_taken(market: Market) -> None:
    pool_id = await market.draft()
    another = {"declaredCapacity": capacity(model_id="org/smaller")}
    answer = await market.operate("PATCH", f"/pools/{pool_id}", another)
    assert answer.refusal == (422, "invalid_request")
    assert "'org/smaller'" in answer.error["message"]


# --- going live --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("told", "code"),
    [
        ({"capacity": None}, "capacity_unmeasured"),
        ({"measured_at": None}, "capacity_unmeasured"),
        ({"model_id": "org/another"}, "capacity_unmeasured"),
        ({"slots": 2}, "not_feasible"),
        ({"base_s": 0.018}, "not_feasible"),
    ],
)
async def test_nobody_is_charged_for_seats_that_no_node_has_proven_to_honour(
    market: Market, told: dict[str, Any], code: str
) -> None:
    pool_id = await market.pool(blocks=NIGHT, min_seats=3)
    customers = await buyers(market, pool_id, 3)
    await market.settle()
    assert (await shown(market, pool_id))["activationProblem"]["code"] == "no_ready_node"
    node_id = await market.node(pool_id, **told)
    await market.settle()
    seen = await shown(market, pool_id)
    assert (seen["status"], seen["activationProblem"]["code"]) == ("activating", code)
    assert await market.taken() == [FEE_CENTS] * 3
    # Measured anew, by a better machine say.
    await tell(market, node_id, measured())
    await market.settle()
    seen = await shown(market, pool_id)
    assert (seen["status"], seen["activationProblem"]) == ("active", None)
    assert [await each.status(pool_id) for each in customers] == ["active"] * 3
    assert sorted(await market.taken()) == [FEE_CENTS] * 3 + [2_700] * 3


@on_sqlite_only
async def test_what_keeps_a_pool_from_going_live_is_told_with_its_figures(market: Market) -> None:
    pool_id = await market.pool(blocks=NIGHT, min_seats=3)
    await buyers(market, pool_id, 3)
    node_id = await market.node(pool_id, slots=2)
    await market.settle()
    problem = (await shown(market, pool_id))["activationProblem"]
    [figures] = problem["details"]["nodes"]
    assert (figures["nodeId"], figures["seats"], figures["mostSeats"]) == (node_id, 3, 2)
    assert "3 of 2 slots" in problem["message"]
    # Measuring again gives no slots, but it may find a faster machine.
    assert "measures itself again" not in problem["message"]
    await tell(market, node_id, measured(base_s=0.018))
    await market.settle()
    assert "measures itself again" in (await shown(market, pool_id))["activationProblem"]["message"]


@on_sqlite_only
async def test_a_pool_that_guarantees_nothing_goes_live_without_a_measurement(market: Market) -> None:
    pool_id = await market.pool(min_seats=1, guarantee_tok_s=0)
    await buyers(market, pool_id, 1)
    await market.node(pool_id, capacity=None)
    await market.settle()
    assert await market.status(pool_id) == "active"
    assert await codes(market, pool_id) == []


@on_sqlite_only
async def test_every_block_is_judged_by_itself(market: Market) -> None:
    """Seats of one block rest while those of another are used."""
    pool_id = await market.pool(min_seats=6)
    await buyers(market, pool_id, 3, "night")
    await buyers(market, pool_id, 3, "europe")
    await market.node(pool_id, slots=3)
    await market.settle()
    assert await market.status(pool_id) == "active"


async def test_a_pledge_must_fit_on_one_node(market: Market) -> None:
    pool_id = await market.pool(min_seats=6, nodes=2)
    await buyers(market, pool_id, 2, quantity=3)
    nodes = [await market.node(pool_id, slots=2) for _ in range(3)]
    await market.settle()
    assert (await shown(market, pool_id))["activationProblem"]["code"] == "not_feasible"
    for node_id in nodes[:2]:
        await tell(market, node_id, measured(slots=3))
    await market.settle()
    assert await market.status(pool_id) == "active"
    seats = {node["id"]: node["seats"] for node in (await market.operate("GET", "/nodes")).data}
    assert seats == {nodes[0]: 3, nodes[1]: 3, nodes[2]: 0}


@on_sqlite_only
async def test_large_pledges_are_placed_before_small_ones_fill_their_nodes(market: Market) -> None:
    pool_id = await market.pool(min_seats=8, nodes=2)
    await buyers(market, pool_id, 4)
    await buyers(market, pool_id, 1, quantity=4)
    for _ in range(2):
        await market.node(pool_id, slots=4)
    await market.settle()
    assert await market.status(pool_id) == "active"
    assert [node["busiestBlockSeats"] for node in (await market.operate("GET", "/nodes")).data] == [4, 4]


# --- lost between the charge and the start ---------------------------------------------------------------


async def charged_and_then(market: Market, pool_id: str, **told: Any) -> str:
    """Everybody's month is paid, and in the same moment the node is lost, or slower."""
    node_id = await market.node(pool_id)
    charge = market.gateway.charge

    async def charge_and_lose(*arguments: Any) -> Any:
        outcome = await charge(*arguments)
        if told:
            await tell(market, node_id, measured(**told))
        else:
            await market.hear(node_id, ServingState.FAILED)
        return outcome

    market.gateway.charge = charge_and_lose  # type: ignore[method-assign,assignment]
    await market.settle()
    market.gateway.charge = charge  # type: ignore[method-assign]
    return node_id


@pytest.mark.parametrize("told", [{}, {"slots": 1}])
async def test_a_node_that_was_lost_while_cards_were_charged_is_waited_for(
    market: Market, told: dict[str, Any]
) -> None:
    pool_id = await market.pool(min_seats=2)
    customers = await buyers(market, pool_id, 2)
    node_id = await charged_and_then(market, pool_id, **told)
    assert await market.status(pool_id) == "activating"
    assert sorted(await market.taken()) == [FEE_CENTS] * 2 + [2_700] * 2
    assert [await each.status(pool_id) for each in customers] == ["pledged"] * 2
    await market.wait(minutes=59)
    assert await market.status(pool_id) == "activating"
    await market.hear(node_id)
    await tell(market, node_id, measured())
    start = market.clock()
    await market.settle()
    assert await market.status(pool_id) == "active"
    # Nobody has lost the time for which the pool waited.
    [row, _] = await market.rows("SELECT activated_at FROM pledges")
    assert str(row[0])[:16] == start.strftime("%Y-%m-%d %H:%M")
    assert sorted(await market.taken()) == [FEE_CENTS] * 2 + [2_700] * 2


async def test_after_an_hour_without_a_node_the_months_go_back(market: Market) -> None:
    pool_id = await market.pool(min_seats=2)
    customers = await buyers(market, pool_id, 2)
    node_id = await charged_and_then(market, pool_id)
    await market.wait(minutes=60)
    assert await market.taken() == [FEE_CENTS] * 2
    await market.settle()
    # It tries again, and nobody is charged before a node is there.
    assert await market.status(pool_id) == "activating"
    assert await market.taken() == [FEE_CENTS] * 2
    assert (await customers[0].withdraw(pool_id)).status == 200
    await buyers(market, pool_id, 1)
    await market.hear(node_id)
    await market.settle()
    assert await market.status(pool_id) == "active"
    assert sorted(await market.taken()) == [FEE_CENTS] * 3 + [2_700] * 2


# --- selling in a live pool ------------------------------------------------------------------------------


async def test_a_live_pool_sells_nothing_while_none_of_its_nodes_is_ready(market: Market) -> None:
    pool_id = await market.live_pool()
    before = await market.taken()
    market.clock.advance(41)
    customer = await market.customer()
    answer = await customer.subscribe(pool_id)
    assert answer.refusal == (503, "pool_unavailable")
    assert int(answer.headers["retry-after"]) > 0
    assert await market.taken() == before
    assert await market.pledged_slots(pool_id) == 1
    await market.hear_all()
    assert (await customer.subscribe(pool_id)).data["status"] == "active"


@on_sqlite_only
async def test_whose_month_waited_for_a_paused_pool_is_not_charged_before_a_node_is_ready(
    market: Market,
) -> None:
    pool_id = await market.live_pool()
    customer = await market.customer()
    charge = market.gateway.charge

    async def pause_then_charge(*arguments: Any) -> Any:
        _ = (await market.operate("POST", f"/pools/{pool_id}/pause")).data
        return await charge(*arguments)

    market.gateway.charge = pause_then_charge  # type: ignore[method-assign,assignment]
    assert (await customer.subscribe(pool_id)).data["status"] == "pledged"
    market.gateway.charge = charge  # type: ignore[method-assign]
    before = await market.taken()
    market.clock.advance(41)
    _ = (await market.operate("POST", f"/pools/{pool_id}/resume")).data
    await market.settle()
    assert (await customer.status(pool_id), await market.taken()) == ("pledged", before)
    await market.hear_all()
    await market.settle()
    assert await customer.status(pool_id) == "active"


async def test_a_live_pool_sells_no_seat_that_its_nodes_cannot_honour(market: Market) -> None:
    pool_id = await market.pool(min_seats=1)
    await market.node(pool_id, slots=3)
    await buyers(market, pool_id, 1, "night", quantity=2)
    await market.settle()
    customer = await market.customer()
    answer = await customer.subscribe(pool_id, "night", "europe", quantity=2)
    assert answer.refusal == (409, "sold_out")
    assert answer.error["details"] == {"blocks": [{"block": "night", "requested": 2, "available": 1}]}
    assert (await customer.subscribe(pool_id, "europe", quantity=3)).data["status"] == "active"


# --- alarms ----------------------------------------------------------------------------------------------


async def test_a_lost_node_raises_an_alarm(market: Market) -> None:
    pool_id = await market.live_pool()
    idle = await market.node(pool_id)
    await market.hear_all()
    assert await codes(market, pool_id) == []
    market.clock.advance(41)
    await market.hear(idle)
    [alarm] = (await shown(market, pool_id))["alarms"]
    assert alarm["code"] == "node_lost"
    assert alarm["nodeId"] != idle
    assert "unheard" in alarm["message"]
    await market.hear_all()
    assert await codes(market, pool_id) == []


@on_sqlite_only
async def test_a_slower_node_raises_an_alarm_with_its_figures(market: Market) -> None:
    pool_id = await market.live_pool()
    [node] = (await market.operate("GET", "/nodes")).data
    assert (node["guaranteeTokS"], node["busiestBlockSeats"], node["mostSeats"]) == (50.0, 1, 184)
    await tell(market, node["id"], measured(base_s=0.02))
    [alarm] = (await shown(market, pool_id))["alarms"]
    assert (alarm["code"], alarm["nodeId"]) == ("below_capacity", node["id"])
    assert (alarm["details"]["seats"], alarm["details"]["mostSeats"]) == (1, 0)
    assert alarm["details"]["fails"] == ["step_time"]
    await tell(market, node["id"], None)
    assert await codes(market, pool_id) == ["capacity_unmeasured"]


@on_sqlite_only
async def test_a_missed_guarantee_raises_an_alarm_and_is_shown(market: Market) -> None:
    pool_id = await market.live_pool()
    [(pledge_id,)] = await market.rows("SELECT id FROM pledges")
    for attainment, expected in ((0.95, []), (0.94, ["guarantee_missed"])):
        await met(market, pledge_id, attainment)
        seen = await shown(market, pool_id)
        assert [alarm["code"] for alarm in seen["alarms"]] == expected
        assert seen["attainment60s"] == attainment
        [node] = (await market.operate("GET", "/nodes")).data
        assert node["attainment60s"] == attainment
    assert seen["alarms"][0]["pledgeId"] == pledge_id
    market.clock.advance(120)
    await market.hear_all()
    assert (await shown(market, pool_id))["attainment60s"] is None
    assert await codes(market, pool_id) == []


async def met(market: Market, pledge_id: str, attainment: float) -> None:
    """What the last minute's report said."""
    minute = market.clock().replace(second=0, microsecond=0)
    figures = {"requests": 1, "input_tokens": 1, "output_tokens": 1, "owed_tokens": 1, "shortfall_tokens": 0}
    async with market.database.write() as session:
        row = ThroughputMinute(pledge_id=pledge_id, minute=minute, attainment_60s=attainment, **figures)
        await session.merge(row)


@on_sqlite_only
async def test_alarms_are_logged_when_they_begin_and_when_they_are_over(
    market: Market, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "boosts.lifecycle")
    pool_id = await market.live_pool()
    for _ in range(5):
        await market.wait(seconds=41)
    begun = [record for record in caplog.records if "alarm: " in record.message]
    assert len(begun) == 1
    assert begun[0].levelno == logging.WARNING
    assert "node_lost" in begun[0].message
    await market.hear_all()
    await market.wait(seconds=10)
    assert sum("alarm over: " in record.message for record in caplog.records) == 1
    assert await codes(market, pool_id) == []


@on_sqlite_only
async def test_a_paused_pool_has_no_alarms(market: Market) -> None:
    pool_id = await market.live_pool()
    market.clock.advance(41)
    _ = (await market.operate("POST", f"/pools/{pool_id}/pause")).data
    assert await codes(market, pool_id) == []
