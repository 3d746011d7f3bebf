"""Nodes: who is ready, who takes the next pledge, and what their orders say."""

from __future__ import annotations

import datetime

import pytest

from contract.blocks import Block
from contract.entitlements import BlockTime, PledgeStatus, PoolStatus
from contract.nodes import Orders, ServingState
from control_plane.database import Database
from control_plane.nodes import orders, service
from control_plane.nodes.tables import Node
from control_plane.pledges.tables import PledgeState
from control_plane.pools import service as pools
from control_plane.pools.tables import Pool, PoolState
from tests.unit.control_plane.conftest import NOON, add_node, add_pledge, add_pool

SECOND = datetime.timedelta(seconds=1)
NIGHT, EUROPE, AMERICAS = (block.value for block in Block)


async def ready(database: Database, pool: Pool, now: datetime.datetime = NOON) -> list[str]:
    async with database.read() as session:
        return [node.id for node in await service.ready_nodes(session, pool, now)]


async def chosen(database: Database, pool: Pool, *blocks: Block) -> Node | None:
    async with database.read() as session:
        return await service.choose_node(session, pool, blocks or tuple(Block), NOON)


# --- standing ------------------------------------------------------------------------------------


async def test_a_node_is_ready_while_it_is_heard(database: Database) -> None:
    pool = await add_pool(database)
    node, _ = await add_node(database, pool)
    assert await ready(database, pool, NOON + 40 * SECOND) == [node.id]
    assert await ready(database, pool, NOON + 41 * SECOND) == []


@pytest.mark.parametrize(
    "unfit",
    [
        {"heard_at": None},
        {"serving": ServingState.STARTING},
        {"serving": ServingState.DRAINING},
        {"model_id": "another/model"},
        {"model_id": None},
        {"draining": True},
    ],
    ids=str,
)
async def test_only_nodes_that_serve_the_pools_model_are_ready(
    database: Database, unfit: dict[str, object]
) -> None:
    pool = await add_pool(database)
    await add_node(database, pool, **unfit)
    node, _ = await add_node(database, pool)
    await add_node(database, await add_pool(database))
    assert await ready(database, pool) == [node.id]


async def test_a_nodes_state_is_the_wish_then_the_silence_then_servings_own(database: Database) -> None:
    pool = await add_pool(database)
    late = NOON + 41 * SECOND
    draining, _ = await add_node(database, pool, draining=True)
    failed, _ = await add_node(database, pool, serving=ServingState.FAILED)
    assert [service.state(draining, now).value for now in (NOON, late)] == ["draining", "draining"]
    assert [service.state(failed, now).value for now in (NOON, late)] == ["failed", "unheard"]
    for serving in ServingState:
        node = Node(draining=False, heard_at=NOON, serving=serving)
        assert service.state(node, NOON).value == serving.value


# --- choice --------------------------------------------------------------------------------------


async def test_a_pledge_goes_to_the_node_with_the_fewest_reserved_seats(database: Database) -> None:
    pool = await add_pool(database)
    full, _ = await add_node(database, pool)
    spare, _ = await add_node(database, pool, created_at=NOON + SECOND)
    await add_pledge(database, pool, full, quantity=2, blocks=[NIGHT, EUROPE])
    await add_pledge(database, pool, spare, quantity=3, blocks=[NIGHT])
    found = await chosen(database, pool)
    assert found is not None and found.id == spare.id


async def test_seats_in_the_blocks_that_are_asked_for_come_first(database: Database) -> None:
    pool = await add_pool(database)
    by_night, _ = await add_node(database, pool)
    by_day, _ = await add_node(database, pool, created_at=NOON + SECOND)
    await add_pledge(database, pool, by_night, quantity=5, blocks=[NIGHT])
    await add_pledge(database, pool, by_day, quantity=1, blocks=[EUROPE])
    found = await chosen(database, pool, Block.EUROPE)
    assert found is not None and found.id == by_night.id


async def test_seats_of_pledges_without_a_subscription_do_not_count(database: Database) -> None:
    pool = await add_pool(database)
    once_full, _ = await add_node(database, pool)
    in_use, _ = await add_node(database, pool, created_at=NOON + SECOND)
    await add_pledge(database, pool, once_full, quantity=20, state=PledgeState.CANCELED)
    await add_pledge(database, pool, in_use, state=PledgeState.PAST_DUE)
    found = await chosen(database, pool)
    assert found is not None and found.id == once_full.id


async def test_a_ready_node_is_chosen_before_an_emptier_one_that_is_not(database: Database) -> None:
    pool = await add_pool(database)
    await add_node(database, pool, serving=ServingState.STARTING)
    ready_one, _ = await add_node(database, pool, created_at=NOON + SECOND)
    await add_pledge(database, pool, ready_one)
    found = await chosen(database, pool)
    assert found is not None and found.id == ready_one.id


async def test_of_equal_nodes_the_oldest_is_chosen(database: Database) -> None:
    pool = await add_pool(database)
    await add_node(database, pool, created_at=NOON + SECOND)
    oldest, _ = await add_node(database, pool)
    found = await chosen(database, pool)
    assert found is not None and found.id == oldest.id


async def test_a_draining_node_is_never_chosen(database: Database) -> None:
    pool = await add_pool(database)
    await add_node(database, pool, draining=True)
    assert await chosen(database, pool) is None
    unready, _ = await add_node(database, pool, heard_at=None)
    found = await chosen(database, pool)
    assert found is not None and found.id == unready.id


# --- orders --------------------------------------------------------------------------------------


async def built(database: Database, pool: Pool, node: Node) -> Orders:
    async with database.read() as session:
        return await orders.build(session, await session.get_one(Pool, pool.id), node)


async def test_orders_hold_the_subscribed_pledges_of_the_node_and_no_others(database: Database) -> None:
    pool = await add_pool(database)
    node, _ = await add_node(database, pool)
    other, _ = await add_node(database, pool)
    active = await add_pledge(database, pool, node, quantity=3, blocks=[NIGHT, AMERICAS])
    past_due = await add_pledge(database, pool, node, state=PledgeState.PAST_DUE, created_at=NOON + SECOND)
    await add_pledge(database, pool, node, state=PledgeState.CANCELED)
    await add_pledge(database, pool, other)
    await add_pledge(database, pool, state=PledgeState.PLEDGED)

    found = (await built(database, pool, node)).entitlements.pledges

    assert [(pledge.pledge_id, pledge.status) for pledge in found] == [
        (active.id, PledgeStatus.ACTIVE),
        (past_due.id, PledgeStatus.PAST_DUE),
    ]
    assert found[0].quantity == 3
    assert found[0].blocks == (BlockTime.of(Block.NIGHT), BlockTime.of(Block.AMERICAS))


async def test_limits_in_orders_are_the_pools_times_the_quantity(database: Database) -> None:
    pool = await add_pool(database, rpm_limit=60, tpm_limit=1_000)
    node, _ = await add_node(database, pool)
    await add_pledge(database, pool, node, quantity=3)
    [pledge] = (await built(database, pool, node)).entitlements.pledges
    assert (pledge.rpm_limit, pledge.tpm_limit) == (180, 3_000)


async def test_a_pledge_is_honoured_for_72_hours_after_its_period(database: Database) -> None:
    pool = await add_pool(database)
    node, _ = await add_node(database, pool)
    await add_pledge(database, pool, node, current_period_end=NOON)
    [pledge] = (await built(database, pool, node)).entitlements.pledges
    assert pledge.valid_until == NOON + datetime.timedelta(hours=72)


@pytest.mark.parametrize(
    ("state", "serve", "status"),
    [
        (PoolState.DRAFT, False, PoolStatus.ACTIVATING),
        (PoolState.FUNDING, False, PoolStatus.ACTIVATING),
        (PoolState.ACTIVATING, True, PoolStatus.ACTIVATING),
        (PoolState.ACTIVE, True, PoolStatus.ACTIVE),
        (PoolState.PAUSED, True, PoolStatus.PAUSED),
    ],
)
async def test_a_node_serves_from_activation_on(
    database: Database, state: PoolState, serve: bool, status: PoolStatus
) -> None:
    pool = await add_pool(database, state)
    node, _ = await add_node(database, pool)
    found = await built(database, pool, node)
    assert (found.serve, found.entitlements.pool.status) == (serve, status)
    assert found.model_id == "org/model"
    assert found.engine_flags == ("--max-num-seqs", "8")


async def test_a_draining_node_does_not_serve_though_the_caller_has_read_it_before(
    database: Database,
) -> None:
    pool = await add_pool(database)
    node, _ = await add_node(database, pool)
    async with database.write() as session:
        await service.set_draining(session, node.id, True)
    assert not node.draining
    assert not (await built(database, pool, node)).serve


async def test_orders_are_never_older_than_their_revision(database: Database) -> None:
    """What changes after the pool was read may be in the orders; their number stays the lower one."""
    pool = await add_pool(database)
    node, _ = await add_node(database, pool)
    async with database.read() as session:
        seen = await session.get_one(Pool, pool.id)
    pledge = await add_pledge(database, pool, node)
    async with database.write() as session:
        pools.touch(await pools.lock(session, pool.id))
    async with database.read() as session:
        found = (await orders.build(session, seen, node)).entitlements
    assert found.revision == 1
    assert [entry.pledge_id for entry in found.pledges] == [pledge.id]
