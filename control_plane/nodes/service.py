"""Nodes: joining, registering, being heard; which of them are ready, and which takes the next pledge.

An agent proves which node it is by its token, and that it is the node's latest agent by its epoch.
What an agent writes is checked against the epoch in the transaction that stores it, with the node's
row locked: a replaced agent cannot slip in a last word.
"""

from __future__ import annotations

import datetime
import enum
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import AsyncSession

from contract.blocks import Block
from contract.keys import KeyKind, is_key, key_sha256, new_key
from contract.nodes import UNREADY_S, Enrolled, Enrolment, Heartbeat, Registration, ServingState
from control_plane.capacity.judgement import Placed, honours
from control_plane.envelope import ApiError
from control_plane.nodes.tables import JoinToken, Node
from control_plane.pledges.tables import SUBSCRIBED_STATES, Pledge
from control_plane.pools import service as pools
from control_plane.pools.tables import Pool

JOIN_TOKEN_VALID = datetime.timedelta(hours=24)
_UNREADY = datetime.timedelta(seconds=UNREADY_S)


class NodeState(enum.Enum):
    """A node as its operator sees it: what is asked of it, else its silence, else what serving does."""

    RETIRED = "retired"
    """Will not come back."""
    DRAINING = "draining"
    """Is to be empty and stopped, or serving lets its last requests finish."""
    DRAINED = "drained"
    """Is empty and stopped, as it was asked to be."""
    UNHEARD = "unheard"
    """Sent no heartbeat for 40 s, or never."""
    STOPPED = "stopped"
    STARTING = "starting"
    READY = "ready"
    FAILED = "failed"


# --- joining -------------------------------------------------------------------------------------


async def new_join_token(
    session: AsyncSession, pool: Pool, now: datetime.datetime
) -> tuple[str, datetime.datetime]:
    """A token with which one node can join the pool, and when it expires."""
    token = new_key(KeyKind.JOIN)
    row = JoinToken(token_sha256=key_sha256(token), pool_id=pool.id, expires_at=now + JOIN_TOKEN_VALID)
    session.add(row)
    return token, row.expires_at


async def enrol(session: AsyncSession, enrolment: Enrolment, now: datetime.datetime) -> Enrolled:
    """Make a node, and use the join token up. Raises ApiError 401 `invalid_join_token`."""
    token = await _usable(session, enrolment.join_token, now)
    node_token = new_key(KeyKind.NODE)
    node = Node(
        pool_id=token.pool_id, name=enrolment.name, token_sha256=key_sha256(node_token), created_at=now
    )
    session.add(node)
    # The token's row refers to the node's.
    await session.flush()
    token.used_by = node.id
    pool = await session.get_one(Pool, token.pool_id)
    return Enrolled(node_id=node.id, node_token=node_token, pool_slug=pool.slug)


async def _usable(session: AsyncSession, text: str, now: datetime.datetime) -> JoinToken:
    """The token's row, locked: of two nodes that come with one token, one joins."""
    if not is_key(text, KeyKind.JOIN):
        raise _invalid_join_token(f"is mistyped or is none ({KeyKind.JOIN.value}...)")
    token = await session.get(JoinToken, key_sha256(text), with_for_update=True)
    if token is None:
        raise _invalid_join_token("is unknown to this control plane")
    if token.used_by is not None:
        raise _invalid_join_token("was used already; each lets one node join, once")
    if token.expires_at <= now:
        raise _invalid_join_token("has expired; they last 24 hours")
    return token


def _invalid_join_token(what: str) -> ApiError:
    return ApiError(
        401,
        "invalid_join_token",
        f"This join token {what}. Ask the pool's operator for a new one "
        "(POST /api/admin/pools/<pool>/join-tokens).",
    )


# --- what agents say -----------------------------------------------------------------------------


async def register(session: AsyncSession, node_id: str, registration: Registration) -> int:
    """The agent's epoch: a new one for a new boot, the same one when it asks again."""
    node = await _locked(session, node_id)
    if node.boot_id != registration.boot_id:
        node.boot_id = registration.boot_id
        node.epoch += 1
    node.base_url = registration.base_url
    return node.epoch


async def lock_current(session: AsyncSession, node_id: str, epoch: int) -> Node:
    """The node's row, held until the transaction ends. Raises ApiError 409 `stale_epoch`."""
    node = await _locked(session, node_id)
    check_epoch(epoch, node.epoch)
    return node


def check_epoch(epoch: int, current: int) -> None:
    """Let only the agent that registered last go on. Raises ApiError 409."""
    if epoch < current:
        raise ApiError(
            409,
            "stale_epoch",
            f"Another agent has registered for this node since (its epoch is {current}, yours is {epoch}): "
            "this one has been replaced.",
        )
    if epoch > current:
        raise ApiError(
            409,
            "unknown_epoch",
            f"This control plane has not given out epoch {epoch} (the node's last is {current}); its "
            "database may have been restored from a copy. Register again.",
        )


async def hear(session: AsyncSession, node_id: str, heartbeat: Heartbeat, now: datetime.datetime) -> None:
    """Keep what the node says about itself; `now` is our clock. Raises ApiError 409 `stale_epoch`."""
    node = await lock_current(session, node_id, heartbeat.epoch)
    node.heard_at = now
    node.serving = heartbeat.serving
    node.model_id = heartbeat.model_id
    node.revision = heartbeat.revision
    node.restarts = heartbeat.restarts
    node.spooled_reports = heartbeat.spooled_reports
    node.clock_offset_ms = heartbeat.clock_offset_ms
    node.gpus = [gpu.model_dump(mode="json") for gpu in heartbeat.gpus]
    node.problem = heartbeat.problem
    if heartbeat.capacity is not None:
        node.capacity, node.capacity_at = heartbeat.capacity.model_dump(mode="json"), now


async def _locked(session: AsyncSession, node_id: str) -> Node:
    # `key_share` lets others refer to the node meanwhile: a pledge that moves in need not wait.
    query = select(Node).where(Node.id == node_id).with_for_update(key_share=True)
    node = await session.scalar(query.execution_options(populate_existing=True))
    assert node is not None, "nodes are never deleted"
    return node


# --- what operators say --------------------------------------------------------------------------


async def set_draining(session: AsyncSession, node_id: str, draining: bool) -> None:
    """Empty and stop the node, or let it serve again; saying it twice is saying it once.

    Raises ApiError 404 `node_not_found`, 409 `node_retired`.
    """
    pool, node = await _with_pool(session, node_id)
    if node.retired:
        raise ApiError(409, "node_retired", "This node was retired; its machine may join again as a new one.")
    if node.draining != draining:
        node.draining = draining
        pools.touch(pool)


async def retire(session: AsyncSession, node_id: str) -> None:
    """Give a node up: the lifecycle places its pledges on others. Raises ApiError 404 `node_not_found`.

    A machine that still serves goes on with the orders it has: drain it first if it can be reached.
    """
    pool, node = await _with_pool(session, node_id)
    node.draining = node.retired = True
    await session.execute(update(Pledge).where(Pledge.node_id == node.id).values(node_id=None))
    pools.touch(pool)


async def _with_pool(session: AsyncSession, node_id: str) -> tuple[Pool, Node]:
    """Both rows, locked."""
    pool_id = await session.scalar(select(Node.pool_id).where(Node.id == node_id))
    if pool_id is None:
        raise ApiError(404, "node_not_found", "There is no node with this id.")
    pool = await pools.lock(session, pool_id)
    return pool, await _locked(session, node_id)


# --- standing ------------------------------------------------------------------------------------


def is_heard(node: Node, now: datetime.datetime) -> bool:
    """Whether the node's last heartbeat is recent enough to believe the rest of it."""
    return node.heard_at is not None and now - node.heard_at <= _UNREADY


def is_ready(node: Node, pool: Pool, now: datetime.datetime) -> bool:
    """Whether the node serves the pool's model and may take pledges."""
    return (
        is_heard(node, now)
        and node.serving is ServingState.READY
        and node.model_id == pool.model_id
        and not node.draining
    )


def state(node: Node, now: datetime.datetime) -> NodeState:
    """What to show of the node in one word."""
    if node.retired:
        return NodeState.RETIRED
    if node.draining:
        stopped = is_heard(node, now) and node.serving is ServingState.STOPPED
        return NodeState.DRAINED if stopped else NodeState.DRAINING
    if not is_heard(node, now):
        return NodeState.UNHEARD
    return NodeState(node.serving.value)


async def ready_nodes(session: AsyncSession, pool: Pool, now: datetime.datetime) -> list[Node]:
    """The pool's nodes that are ready, oldest first."""
    return [node for node in await of_pool(session, pool) if is_ready(node, pool, now)]


async def choose_node(
    session: AsyncSession, pool: Pool, blocks: Collection[Block], now: datetime.datetime, quantity: int = 1
) -> Node | None:
    """The node for a new pledge to these blocks; None when there is none that is not draining.

    A ready node before others, and one that has proven to honour the seats too; of them the one with the
    fewest reserved seats in these blocks, then in all, then the oldest. The pool's row should be locked, or
    two pledges may choose alike.
    """
    nodes = [node for node in await of_pool(session, pool) if not node.draining]
    loads = await reserved(session, pool.id)

    def preference(node: Node) -> tuple[bool, bool, int, int]:
        load = loads.get(node.id, Load())
        after = Placed.of([*load.pledges, (quantity, frozenset(blocks))])
        crowded = not honours(node, pool, after)
        return not is_ready(node, pool, now), crowded, load.seats_in(blocks), load.seats

    return min(nodes, key=preference, default=None)


async def of_pool(session: AsyncSession, pool: Pool) -> list[Node]:
    """All nodes of the pool, oldest first."""
    rows = await session.scalars(
        select(Node).where(Node.pool_id == pool.id).order_by(Node.created_at, Node.id)
    )
    return list(rows)


# --- load ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Load:
    """What the subscribed pledges of one node have reserved: (quantity, blocks) of each."""

    pledges: tuple[tuple[int, frozenset[Block]], ...] = ()

    @property
    def seats(self) -> int:
        return self.seats_in(Block)

    def seats_in(self, blocks: Iterable[Block]) -> int:
        """Seats in these blocks; a pledge of 2 to two of them has 4."""
        wanted = frozenset(blocks)
        return sum(quantity * len(pledged & wanted) for quantity, pledged in self.pledges)


async def reserved(session: AsyncSession, pool_id: str | None = None) -> dict[str, Load]:
    """By node, what its active and past-due pledges have reserved; without a pool, of all pools."""
    query = select(Pledge.node_id, Pledge.quantity, Pledge.blocks).where(
        Pledge.node_id.is_not(None), Pledge.state.in_(SUBSCRIBED_STATES)
    )
    if pool_id is not None:
        query = query.where(Pledge.pool_id == pool_id)
    pledges: dict[str, list[tuple[int, frozenset[Block]]]] = {}
    for node_id, quantity, blocks in await session.execute(query):
        pledges.setdefault(node_id, []).append((quantity, frozenset(map(Block, blocks))))
    return {node_id: Load(tuple(entries)) for node_id, entries in pledges.items()}
