"""`boosts pools ...` and `boosts billing ...`: what a customer does with the pools API."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from boosts.console import (
    AsJson,
    Key,
    Minutes,
    Role,
    Url,
    connect,
    show_fields,
    show_json,
    show_minutes,
    show_table,
)
from contract.blocks import Block

if TYPE_CHECKING:
    from boosts.client import BoostKey, Client, PledgeHour, Subscription

pools = typer.Typer(help="Look at pools, and buy seats in them.", no_args_is_help=True)
billing = typer.Typer(help="How your seats are paid.", no_args_is_help=True)

Pool = Annotated[str, typer.Argument(metavar="POOL", help="Slug or id of the pool")]


@pools.command("list")
def list_pools(context: typer.Context, url: Url = None, key: Key = None, as_json: AsJson = False) -> None:
    """All pools that are on offer.

    \b
    examples:
      boosts pools list
      boosts pools list --url https://boosts.example.com --key mk_...
    """
    with connect(context, url, key, Role.CUSTOMER) as client:
        found = client.pools()
    if as_json:
        show_json(found)
        return
    show_table(
        ("POOL", "MODEL", "STATUS", "SEATS TAKEN", "USD/MONTH FROM"),
        [
            (
                pool["slug"],
                pool["modelName"],
                pool["status"],
                f"{pool['pledgedSlots']} of {pool['totalSlots']}",
                pool["minPricePerDay"],
            )
            for pool in found
        ],
        empty="no pools yet",
    )


@pools.command("show")
def show_pool(
    context: typer.Context, pool: Pool, url: Url = None, key: Key = None, as_json: AsJson = False
) -> None:
    """One pool: what it guarantees, and the seats and prices of its blocks.

    \b
    example:
      boosts pools show demo
    """
    with connect(context, url, key, Role.CUSTOMER) as client:
        found = client.pool(pool)
    if as_json:
        show_json(found)
        return
    goes_live = f", goes live with {found['minSeats']}" if found["status"] == "funding" else ""
    show_fields(
        {
            "pool": f"{found['slug']} ({found['id']})",
            "model": f"{found['modelName']} ({found['modelId']})",
            "about": found["description"] or None,
            "machine": found["infraSpec"] or None,
            "status": found["status"],
            "seats": f"{found['pledgedSlots']} of {found['totalSlots']} taken{goes_live}",
            "each seat": f"{found['guaranteeTokS']:g} tok/s guaranteed, up to {found['rpmLimit']} requests"
            f" and {found['tpmLimit']} tokens per minute",
        }
    )
    print()
    show_table(
        ("BLOCK", "UTC", "SEATS", "FREE", "USD/MONTH"),
        [
            (name, _hours(Block(name)), offer["seats"], offer["available"], offer["monthlyPrice"])
            for name, offer in found["blocks"].items()
        ],
        empty="",
    )


@pools.command("subscribe")
def subscribe(
    context: typer.Context,
    pool: Pool,
    block: Annotated[
        list[Block], typer.Option("--block", help="Part of the day; give it once for each you want")
    ],
    quantity: Annotated[int, typer.Option(min=1, max=20, help="Seats in each block")] = 1,
    url: Url = None,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Reserve seats. A live pool gives the key at once, another one when enough seats are pledged.

    A reservation fee of 1 USD is charged to the card on file.

    \b
    examples:
      boosts pools subscribe demo --block europe
      boosts pools subscribe demo --block night --block europe --quantity 2
    """
    with connect(context, url, key, Role.CUSTOMER) as client:
        made = client.subscribe(pool, [name.value for name in block], quantity)
    if as_json:
        show_json(made)
        return
    names = ", ".join(name.value for name in block)
    seats = f"{quantity} seats" if quantity > 1 else "1 seat"
    print(f"{made['status']}: {seats} in {names} for {made['monthlyPrice']} USD a month")
    _show_next_step(pool, made)


@pools.command("my-pledge")
def my_pledge(
    context: typer.Context, pool: Pool, url: Url = None, key: Key = None, as_json: AsJson = False
) -> None:
    """Your seats in a pool, what they cost, and their key once the pool is live.

    \b
    example:
      boosts pools my-pledge demo
    """
    with connect(context, url, key, Role.CUSTOMER) as client:
        pledge = client.my_pledge(pool)
    if as_json:
        show_json(pledge)
        return
    show_fields(
        {
            "pledge": pledge["id"],
            "status": pledge["status"],
            "seats": _seats(pledge["hours"]),
            "USD/month": pledge["monthlyPrice"],
            "paid until": pledge["currentPeriodEnd"],
            **(_key_fields(pledge["key"]) if pledge["key"] else {"key": "none until the pool is live"}),
        }
    )


@pools.command("my-key")
def my_key(
    context: typer.Context, pool: Pool, url: Url = None, key: Key = None, as_json: AsJson = False
) -> None:
    """The key of your seats, and where to use it.

    \b
    examples:
      boosts pools my-key demo
      boosts pools my-key demo --json | jq -r .apiKey
    """
    with connect(context, url, key, Role.CUSTOMER) as client:
        found = client.my_key(pool)
    if as_json:
        show_json(found)
    else:
        show_fields(_key_fields(found))


@pools.command("my-throughput")
def my_throughput(
    context: typer.Context,
    pool: Pool,
    minutes: Minutes = 60,
    url: Url = None,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """What your seats were owed and got, minute by minute. A minute is complete about 20 s after its end.

    \b
    examples:
      boosts pools my-throughput demo
      boosts pools my-throughput demo --minutes 5
    """
    with connect(context, url, key, Role.CUSTOMER) as client:
        found = client.my_throughput(pool, minutes)
    if as_json:
        show_json(found)
        return
    seats = found["quantity"]
    print(f"guaranteed: {found['guaranteeTokS']:g} tok/s for each of {seats} seat{'s' * (seats > 1)}")
    show_minutes(found["minutes"], found["totals"])


@pools.command("cancel")
def cancel(
    context: typer.Context, pool: Pool, url: Url = None, key: Key = None, as_json: AsJson = False
) -> None:
    """Give a reservation back before the pool goes live. Active ones end through the billing portal.

    \b
    example:
      boosts pools cancel demo
    """
    with connect(context, url, key, Role.CUSTOMER) as client:
        answer = client.cancel(pool)
    if as_json:
        show_json(answer)
    else:
        print(f"canceled: your seats in {pool} are free again")


@billing.command("payment-method")
def payment_method(
    context: typer.Context,
    method: Annotated[str, typer.Argument(metavar="PAYMENT_METHOD", help="The provider's token, pm_...")],
    url: Url = None,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Put a card on file; it pays for every seat you reserve.

    \b
    example (a test card of the embedded payment ledger):
      boosts billing payment-method pm_card_visa
    """
    with connect(context, url, key, Role.CUSTOMER) as client:
        answer = client.set_payment_method(method)
    if as_json:
        show_json(answer)
    else:
        print(f"on file: {answer['brand']} ending in {answer['last4']}")


@billing.command("show")
def show_billing(context: typer.Context, url: Url = None, key: Key = None, as_json: AsJson = False) -> None:
    """All your pledges, what they cost, and until when they are paid.

    \b
    example:
      boosts billing show
    """
    with connect(context, url, key, Role.CUSTOMER) as client:
        found = client.pledges()
    if as_json:
        show_json(found)
        return
    show_table(
        ("POOL", "STATUS", "USD/MONTH", "PAID UNTIL", "THEN"),
        [
            (
                pledge["poolSlug"],
                pledge["status"],
                pledge["monthlyPrice"],
                pledge["currentPeriodEnd"] or "-",
                "ends" if pledge["cancelAtPeriodEnd"] else "renews",
            )
            for pledge in found
        ],
        empty="no pledges",
    )


@billing.command("cancel")
def end_subscription(
    context: typer.Context, pool: Pool, url: Url = None, key: Key = None, as_json: AsJson = False
) -> None:
    """Let the subscription in a pool end with its paid month; the key works until then.

    \b
    example:
      boosts billing cancel demo
    """
    with connect(context, url, key, Role.CUSTOMER) as client:
        answer = client.end_subscription(_subscription(client, pool))
    if as_json:
        show_json(answer)
    elif answer["status"] == "canceled":
        print(f"your subscription in {pool} has ended: it was not paid for any longer")
    else:
        print(f"your subscription in {pool} ends at {answer['currentPeriodEnd']}; the key works until then")


@billing.command("resume")
def resume_subscription(
    context: typer.Context, pool: Pool, url: Url = None, key: Key = None, as_json: AsJson = False
) -> None:
    """Take a cancellation back, before the paid month is over.

    \b
    example:
      boosts billing resume demo
    """
    with connect(context, url, key, Role.CUSTOMER) as client:
        answer = client.resume_subscription(_subscription(client, pool))
    if as_json:
        show_json(answer)
    else:
        print(f"your subscription in {pool} renews at {answer['currentPeriodEnd']}")


def _subscription(client: Client, pool: str) -> str:
    """Id of the pledge in the pool. Raises Refused when there is none."""
    return client.my_pledge(pool)["id"]


def _hours(block: Block) -> str:
    return f"{block.first_hour:02}-{block.first_hour + 8:02} h"


def _seats(hours: Sequence[PledgeHour]) -> str:
    """`2 in night, 2 in europe`, from the hours of a pledge."""
    counts = {block: sum(hour["hour"] == block.first_hour for hour in hours) for block in Block}
    return ", ".join(f"{count} in {block.value}" for block, count in counts.items() if count)


def _key_fields(key: BoostKey) -> dict[str, object]:
    return {
        "key": key["apiKey"] if key["isActive"] else f"{key['apiKey']} (suspended)",
        "base URL": key.get("baseUrl"),
        "limits": f"{key['rpmLimit']} requests, {key['tpmLimit']} tokens per minute",
    }


def _show_next_step(pool: str, made: Subscription) -> None:
    key = made.get("key")
    if key:
        show_fields(_key_fields(key))
    else:
        print(f"the key comes when the pool goes live; see it then with: boosts pools my-key {pool}")
