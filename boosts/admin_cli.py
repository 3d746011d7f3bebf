"""`boosts admin ...`: what an operator does: accounts, pools, nodes, and what was delivered."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from boosts.console import (
    THROUGHPUT_COLUMNS,
    AsJson,
    Key,
    Minutes,
    Role,
    Url,
    connect,
    percent,
    read_json_file,
    show_fields,
    show_json,
    show_minutes,
    show_table,
    throughput_cells,
)

if TYPE_CHECKING:
    from boosts.client import AdminPool, BlockTerms, ShownNode

admin = typer.Typer(help="Operate a control plane: accounts, pools, nodes.", no_args_is_help=True)
accounts = typer.Typer(help="Customers' accounts.", no_args_is_help=True)
pools = typer.Typer(help="Make and open pools.", no_args_is_help=True)
nodes = typer.Typer(help="The machines that serve.", no_args_is_help=True)
admin.add_typer(accounts, name="accounts")
admin.add_typer(pools, name="pools")
admin.add_typer(nodes, name="nodes")

Pool = Annotated[str, typer.Argument(metavar="POOL", help="Slug or id of the pool")]
Node = Annotated[str, typer.Argument(metavar="NODE", help="Id of the node")]
TermsFile = Annotated[
    Path, typer.Argument(metavar="FILE.json", help="Terms of the pool as JSON; - reads standard input")
]


@accounts.command("create")
def create_account(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="Who it is for")],
    email: Annotated[str, typer.Argument(help="One account for each address")],
    url: Url = None,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Make a customer's account. Its management key is shown this once.

    \b
    example:
      boosts admin accounts create "Acme Inc." it@acme.example
    """
    with connect(context, url, key, Role.OPERATOR) as client:
        made = client.create_account(name, email)
    if as_json:
        show_json(made)
    else:
        show_fields({"account": made["id"], "key": f"{made['managementKey']} (shown this once)"})


@accounts.command("new-key")
def new_key(
    context: typer.Context,
    account: Annotated[str, typer.Argument(help="Id of the account")],
    url: Url = None,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Replace an account's management keys, lost or leaked ones, by a new one. It is shown this once.

    \b
    example:
      boosts admin accounts new-key 3f6c...
    """
    with connect(context, url, key, Role.OPERATOR) as client:
        made = client.replace_management_key(account)
    if as_json:
        show_json(made)
    else:
        show_fields({"account": made["id"], "key": f"{made['managementKey']} (shown this once)"})


@accounts.command("list")
def list_accounts(context: typer.Context, url: Url = None, key: Key = None, as_json: AsJson = False) -> None:
    """All accounts, operators' too.

    \b
    example:
      boosts admin accounts list
    """
    with connect(context, url, key, Role.OPERATOR) as client:
        found = client.accounts()
    if as_json:
        show_json(found)
        return
    show_table(
        ("ACCOUNT", "NAME", "EMAIL", "ROLE", "SINCE"),
        [(one["id"], one["name"], one["email"], one["role"], one["createdAt"]) for one in found],
        empty="no accounts yet",
    )


@pools.command("create")
def create_pool(
    context: typer.Context, file: TermsFile, url: Url = None, key: Key = None, as_json: AsJson = False
) -> None:
    """Make a pool from a file: a draft, which customers do not see until it is opened.

    \b
    example of a file:
      {"slug": "qwen3-8b", "modelId": "Qwen/Qwen3-8B", "modelName": "Qwen3 8B",
       "description": "Dedicated Qwen3 8B", "infraSpec": "1x H100, 30 tok/s guaranteed",
       "blocks": {"night": {"seats": 20, "monthlyPrice": "27.00"},
                  "europe": {"seats": 20, "monthlyPrice": "39.00"}},
       "minSeats": 12, "guaranteeTokS": 30, "rpmLimit": 60, "tpmLimit": 100000,
       "engineArgs": ["--max-num-seqs", "256"]}
    """
    terms = read_json_file(context, file)
    with connect(context, url, key, Role.OPERATOR) as client:
        pool = client.create_pool(terms)
    _show_change(pool, as_json)


@pools.command("edit")
def edit_pool(
    context: typer.Context,
    pool: Pool,
    file: TermsFile,
    url: Url = None,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Change fields of a draft; those that the file leaves out stay. Once open, only engineArgs may change.

    \b
    example:
      echo '{"minSeats": 20}' | boosts admin pools edit qwen3-8b -
    """
    changes = read_json_file(context, file)
    with connect(context, url, key, Role.OPERATOR) as client:
        changed = client.edit_pool(pool, changes)
    _show_change(changed, as_json)


@pools.command("list")
def list_pools(context: typer.Context, url: Url = None, key: Key = None, as_json: AsJson = False) -> None:
    """All pools, drafts too.

    \b
    example:
      boosts admin pools list
    """
    with connect(context, url, key, Role.OPERATOR) as client:
        found = client.admin_pools()
    if as_json:
        show_json(found)
        return
    show_table(
        ("POOL", "MODEL", "STATUS", "PLEDGED", "TO GO LIVE", "TOK/S", "60 S", "BLOCKS: SEATS AT USD/MONTH"),
        [
            (
                pool["slug"],
                pool["modelId"],
                pool["status"],
                pool["pledgedSlots"],
                pool["minSeats"],
                f"{pool['guaranteeTokS']:g}",
                percent(pool["attainment60s"]),
                ", ".join(_offer(name, block) for name, block in pool["blocks"].items()),
            )
            for pool in found
        ],
        empty="no pools yet",
    )
    for pool in found:
        for problem in _problems(pool):
            print(f"\n{pool['slug']}: {problem}")


@pools.command("show")
def show_pool(
    context: typer.Context, pool: Pool, url: Url = None, key: Key = None, as_json: AsJson = False
) -> None:
    """One pool: what it guarantees, what its nodes can honour, what it delivers, and what is wrong.

    \b
    example:
      boosts admin pools show qwen3-8b
    """
    with connect(context, url, key, Role.OPERATOR) as client:
        found = client.admin_pool(pool)
        nodes = [node for node in client.nodes() if node["poolSlug"] == found["slug"]]
    if as_json:
        show_json({**found, "nodesNow": nodes})
        return
    show_fields(
        {
            "pool": found["slug"],
            "status": found["status"],
            "guarantee": f"{found['guaranteeTokS']:g} tok/s for each seat",
            "declared": _declared(found),
            "attainment": f"{percent(found['attainment60s'])}, the lowest of 60 s of late",
        }
    )
    for problem in _problems(found):
        print(f"\n{problem}")
    print()
    _show_nodes(nodes)


@pools.command("open")
def open_pool(
    context: typer.Context, pool: Pool, url: Url = None, key: Key = None, as_json: AsJson = False
) -> None:
    """Offer a draft to customers. From here on its terms are fixed.

    \b
    example:
      boosts admin pools open qwen3-8b
    """
    with connect(context, url, key, Role.OPERATOR) as client:
        changed = client.open_pool(pool)
    _show_change(changed, as_json)


@pools.command("pause")
def pause_pool(
    context: typer.Context, pool: Pool, url: Url = None, key: Key = None, as_json: AsJson = False
) -> None:
    """Stop selling and serving an active pool; time that customers paid for stands still.

    \b
    example:
      boosts admin pools pause qwen3-8b
    """
    with connect(context, url, key, Role.OPERATOR) as client:
        changed = client.pause_pool(pool)
    _show_change(changed, as_json)


@pools.command("resume")
def resume_pool(
    context: typer.Context, pool: Pool, url: Url = None, key: Key = None, as_json: AsJson = False
) -> None:
    """Sell and serve a paused pool again.

    \b
    example:
      boosts admin pools resume qwen3-8b
    """
    with connect(context, url, key, Role.OPERATOR) as client:
        changed = client.resume_pool(pool)
    _show_change(changed, as_json)


@nodes.command("list")
def list_nodes(context: typer.Context, url: Url = None, key: Key = None, as_json: AsJson = False) -> None:
    """All nodes, what they are doing, and why those that are not ready are not.

    \b
    example:
      boosts admin nodes list
    """
    with connect(context, url, key, Role.OPERATOR) as client:
        found = client.nodes()
    if as_json:
        show_json(found)
    else:
        _show_nodes(found)


@nodes.command("join-token")
def join_token(
    context: typer.Context, pool: Pool, url: Url = None, key: Key = None, as_json: AsJson = False
) -> None:
    """A token with which one new node joins a pool, once.

    \b
    example:
      boosts admin nodes join-token qwen3-8b
    """
    with connect(context, url, key, Role.OPERATOR) as client:
        made = client.new_join_token(pool)
        address = client.url
    if as_json:
        show_json(made)
        return
    show_fields({"token": made["joinToken"], "valid until": made["expiresAt"]})
    print("\non the node:")
    print(f"  boosts node --control-plane {address} --join-token {made['joinToken']}")


@nodes.command("drain")
def drain_node(
    context: typer.Context, node: Node, url: Url = None, key: Key = None, as_json: AsJson = False
) -> None:
    """Let a node finish what runs, then stop its serving; the agent stays.

    \b
    example:
      boosts admin nodes drain 3f6c...
    """
    with connect(context, url, key, Role.OPERATOR) as client:
        answer = client.drain_node(node)
    if as_json:
        show_json(answer)
    else:
        print(f"draining {node}; `boosts admin nodes list` shows when it has stopped")


@nodes.command("undrain")
def undrain_node(
    context: typer.Context, node: Node, url: Url = None, key: Key = None, as_json: AsJson = False
) -> None:
    """Let a drained node serve again.

    \b
    example:
      boosts admin nodes undrain 3f6c...
    """
    with connect(context, url, key, Role.OPERATOR) as client:
        answer = client.undrain_node(node)
    if as_json:
        show_json(answer)
    else:
        print(f"{node} serves again")


@nodes.command("retire")
def retire_node(
    context: typer.Context, node: Node, url: Url = None, key: Key = None, as_json: AsJson = False
) -> None:
    """Give up a node that will not come back; its pledges move to other nodes of the pool.

    Drain it first if it can be reached: it goes on with the orders that it has.

    \b
    example:
      boosts admin nodes retire 3f6c...
    """
    with connect(context, url, key, Role.OPERATOR) as client:
        answer = client.retire_node(node)
    if as_json:
        show_json(answer)
    else:
        print(f"retired {node}; its pledges move to other nodes of the pool")


@admin.command("throughput")
def throughput(
    context: typer.Context,
    pool: Pool,
    minutes: Minutes = 60,
    url: Url = None,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """What a pool's seats were owed and got: by pledge, and by minute.

    \b
    example:
      boosts admin throughput qwen3-8b --minutes 10
    """
    with connect(context, url, key, Role.OPERATOR) as client:
        found = client.throughput(pool, minutes)
    if as_json:
        show_json(found)
        return
    show_table(
        ("PLEDGE", "STATUS", "SEATS", *THROUGHPUT_COLUMNS, "SHORTFALL"),
        [
            (
                one["pledgeId"],
                one["status"],
                one["seats"],
                *throughput_cells(one),
                f"{one['shortfallTokens']:.0f}",
            )
            for one in found["pledges"]
        ],
        empty="no pledges that are subscribed",
    )
    print()
    show_minutes(found["minutes"], found["totals"])


def _show_nodes(found: Sequence[ShownNode]) -> None:
    show_table(
        (
            *("NODE", "NAME", "POOL", "STATE", "HEARD", "RESTARTS"),
            *("SEATS", "AT ONCE", "HONOURS", "TOK/S", "60 S", "URL"),
        ),
        [
            (
                *(node["id"], node["name"], node["poolSlug"], node["state"]),
                *(node["lastHeartbeatAt"], node["restarts"]),
                *(node["seats"], node["busiestBlockSeats"], node["mostSeats"]),
                *(f"{node['guaranteeTokS']:g}", percent(node["attainment60s"]), node["baseUrl"]),
            )
            for node in found
        ],
        empty="no nodes yet",
    )
    for node in found:
        if node["problem"]:
            print(f"\n{node['id']}: {node['problem']}")


def _problems(pool: AdminPool) -> list[str]:
    """What keeps the pool from going live, and its alarms."""
    waiting = pool["activationProblem"]
    found = [] if waiting is None else [f"waits: {waiting['message']} ({waiting['code']})"]
    return found + [f"ALARM: {alarm['message']} ({alarm['code']})" for alarm in pool["alarms"]]


def _declared(pool: AdminPool) -> str | None:
    judged = pool["feasibility"]
    if judged is None:
        return None
    if judged["mostSeats"] is None:
        return "nothing is guaranteed, so any number of seats is honoured"
    said = "honoured" if judged["fits"] else f"too many ({', '.join(judged['fails'])})"
    nodes = "one node" if pool["nodes"] == 1 else f"each of {pool['nodes']} nodes"
    return f"{judged['seats']} seats at once on {nodes}: {said}; it honours {judged['mostSeats']} at most"


def _offer(name: str, block: BlockTerms) -> str:
    return f"{name} {block['seats']} at {block['monthlyPrice']}"


def _show_change(pool: AdminPool, as_json: bool) -> None:
    if as_json:
        show_json(pool)
    else:
        print(f"pool {pool['slug']} is {pool['status']} ({pool['id']})")
