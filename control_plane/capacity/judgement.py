"""Whether seats fit on nodes, by what the operator declared and by what the nodes have measured. Pure.

A pledge lives wholly on one node, so nothing is judged over all nodes together.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from contract.blocks import Block
from contract.capacity import Bound, Feasibility, NodeCapacity, Promise, judge
from control_plane.envelope import ApiError
from control_plane.nodes.tables import Node
from control_plane.pools.tables import Pool, PoolBlock

Bundle = tuple[int, frozenset[Block]]
"""The seats of one pledge: so many in each of these blocks."""

_TOO_SLOW = {Bound.STEP_TIME, Bound.STEP_TOKENS}
_MEASURED_AGAIN = (
    " If something else slowed a node while it measured itself, see that it has the machine to itself: after "
    "ten minutes without requests it measures itself again."
)


@dataclass(frozen=True, slots=True)
class Problem:
    """Why seats cannot be honoured."""

    code: str
    message: str
    details: dict[str, Any] = field(default_factory=dict)


def promise_of(pool: Pool) -> Promise:
    """What the pool promises to each seat."""
    return Promise(
        guarantee_tok_s=pool.guarantee_tok_s,
        tpm_limit=pool.tpm_limit,
        prefill_tok_s=pool.prefill_tok_s,
        context_tokens=pool.context_tokens,
        margin=pool.capacity_margin,
    )


def is_promised(pool: Pool) -> bool:
    """Whether seats have a guarantee at all: without one any number of them is honoured."""
    return pool.guarantee_tok_s > 0


def figures(feasibility: Feasibility) -> dict[str, Any]:
    """For an error's details and the operator's API."""
    return {
        "seats": feasibility.seats,
        "fits": feasibility.fits,
        "fails": [bound.value for bound in feasibility.fails],
        "mostSeats": feasibility.most_seats,
        "slots": feasibility.slots,
        "stepNeededMs": round(feasibility.step_needed_ms, 3),
        "stepAllowedMs": _rounded(feasibility.step_allowed_ms),
        "prefillTokensPerStep": round(feasibility.prefill_tokens_per_step, 1),
        "kvTokensNeeded": feasibility.kv_tokens_needed,
        "kvTokens": feasibility.kv_tokens,
    }


def _rounded(milliseconds: float | None) -> float | None:
    # JSON has no infinity, which is the pace of a guarantee close to nothing.
    finite = milliseconds is not None and math.isfinite(milliseconds)
    return round(milliseconds, 3) if milliseconds is not None and finite else None


# --- declared --------------------------------------------------------------------------------------


def declared(pool: Pool, blocks: Collection[PoolBlock]) -> tuple[Block, Feasibility] | None:
    """The fullest block, and whether a node of the declared kind honours its share of that block's seats.

    None where nothing is declared.
    """
    if pool.declared_capacity is None:
        return None
    fullest = max(blocks, key=lambda row: row.seats)
    share = math.ceil(fullest.seats / pool.nodes)
    return fullest.block, judge(NodeCapacity.model_validate(pool.declared_capacity), promise_of(pool), share)


def require_declared(pool: Pool, blocks: Collection[PoolBlock]) -> None:
    """Before a pool is opened. Raises ApiError 409 `capacity_undeclared`, `not_feasible`."""
    if not is_promised(pool):
        return
    judged = declared(pool, blocks)
    if judged is None:
        raise ApiError(
            409,
            "capacity_undeclared",
            f"This pool guarantees {pool.guarantee_tok_s:g} tok/s to each seat, but nothing says what its "
            "nodes can do. Measure one with `boosts capacity`, and give the capacity.json that it writes as "
            "declaredCapacity; or guarantee nothing (guaranteeTokS 0).",
        )
    block, feasibility = judged
    if not feasibility.fits:
        nodes = "one node" if pool.nodes == 1 else f"each of {pool.nodes} nodes"
        raise ApiError(
            409,
            "not_feasible",
            f"The declared capacity does not honour the seats of the {block.value} block on {nodes}, at "
            f"{pool.guarantee_tok_s:g} tok/s for each seat: {feasibility}.",
            {"block": block.value, "nodes": pool.nodes, **figures(feasibility)},
        )


# --- measured --------------------------------------------------------------------------------------


def measured(node: Node, pool: Pool) -> NodeCapacity | None:
    """What the node has measured of itself; None where it has not, or with another model."""
    if node.capacity is None:
        return None
    capacity = NodeCapacity.model_validate(node.capacity)
    proven = capacity.measured_at is not None and capacity.model_id == pool.model_id
    return capacity if proven else None


@dataclass(frozen=True, slots=True)
class Placed:
    """Seats by block that are on a node, or are about to be."""

    seats: Mapping[Block, int] = field(default_factory=dict)

    def with_bundle(self, bundle: Bundle) -> Placed:
        quantity, blocks = bundle
        return Placed({**self.seats, **{block: self.seats.get(block, 0) + quantity for block in blocks}})

    @classmethod
    def of(cls, bundles: Iterable[Bundle]) -> Placed:
        placed = cls()
        for bundle in bundles:
            placed = placed.with_bundle(bundle)
        return placed

    @property
    def busiest(self) -> int:
        """Seats of the block that has most: those that the node must honour at once."""
        return max(self.seats.values(), default=0)


def most_seats(node: Node, pool: Pool) -> float:
    """Of one block, that the node has proven to honour; infinite where nothing is promised."""
    if not is_promised(pool):
        return math.inf
    capacity = measured(node, pool)
    if capacity is None:
        return 0
    most = judge(capacity, promise_of(pool), 0).most_seats
    assert most is not None, "something is promised"
    return most


def honours(node: Node, pool: Pool, placed: Placed) -> bool:
    """Whether the node has proven that it keeps what is promised to these seats."""
    return placed.busiest <= most_seats(node, pool)


def in_order(bundle: Bundle) -> tuple[int, int]:
    """By which pledges are placed together: large ones first, as small ones fill what they leave."""
    quantity, blocks = bundle
    return -quantity * len(blocks), -quantity


def placing_problem(pool: Pool, ready: Sequence[Node], bundles: Collection[Bundle]) -> Problem | None:
    """Why the nodes that are ready do not honour these pledges; None when they do.

    Pledges are placed one by one as `nodes.service.choose_node` does it.
    """
    if not ready:
        return Problem("no_ready_node", "No node of this pool is ready.")
    if not is_promised(pool):
        return None
    proven = [node for node in ready if measured(node, pool) is not None]
    if not proven:
        return Problem(
            "capacity_unmeasured",
            "No node that is ready has told what it can do with this model, so nothing proves that it keeps "
            f"{pool.guarantee_tok_s:g} tok/s for each seat. Serving measures itself at its start, and "
            "again when it was idle for ten minutes; its log says why it could not. Where it cannot, run "
            "`boosts capacity`, and start the node's agent with --capacity capacity.json.",
            {"nodes": [node.id for node in ready]},
        )
    placed = {node.id: Placed() for node in proven}
    for bundle in sorted(bundles, key=in_order):
        after = {node.id: placed[node.id].with_bundle(bundle) for node in proven}
        fitting = [node for node in proven if honours(node, pool, after[node.id])]
        if not fitting:
            return _no_room(pool, proven, after)
        chosen = min(fitting, key=lambda node: _load(placed[node.id], bundle))
        placed[chosen.id] = after[chosen.id]
    return None


def _load(placed: Placed, bundle: Bundle) -> tuple[int, int]:
    wanted = sum(placed.seats.get(block, 0) for block in bundle[1])
    return wanted, sum(placed.seats.values())


def _no_room(pool: Pool, proven: Sequence[Node], needed: Mapping[str, Placed]) -> Problem:
    judged = {node.id: judged_by_measurement(node, pool, needed[node.id].busiest) for node in proven}
    told = "; ".join(f"node {node.id} ({node.name}): {judged[node.id]}" for node in proven)
    too_slow = any(_TOO_SLOW.intersection(each.fails) for each in judged.values())
    return Problem(
        "not_feasible",
        f"The nodes that are ready have not measured enough to honour the pledged seats at "
        f"{pool.guarantee_tok_s:g} tok/s for each: {told}.{_MEASURED_AGAIN if too_slow else ''}",
        {"nodes": [{"nodeId": node.id, **figures(judged[node.id])} for node in proven]},
    )


def judged_by_measurement(node: Node, pool: Pool, seats: int) -> Feasibility:
    """The figures of so many seats on a node that has measured itself."""
    capacity = measured(node, pool)
    assert capacity is not None, "asked only of nodes that have measured themselves"
    return judge(capacity, promise_of(pool), seats)


def left_on(node: Node, pool: Pool, placed: Placed, order: Bundle) -> dict[Block, float]:
    """Of each block of the order, how many seats more the node honours."""
    most = most_seats(node, pool)
    return {block: max(0, most - placed.seats.get(block, 0)) for block in order[1]}
