"""What the commands that speak to a control plane have in common: where it is, who asks, how it is shown."""

from __future__ import annotations

import contextlib
import enum
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from boosts.demo_file import demo_file, home_folder

if TYPE_CHECKING:
    from boosts.client import Client, Refused, Throughput, ThroughputOfMinute

DEFAULT_URL = "http://127.0.0.1:8000"

Url = Annotated[
    str | None,
    typer.Option("--url", envvar="BOOSTS_CONTROL_PLANE_URL", help="Control plane (default: the demo's)"),
]
Key = Annotated[
    str | None,
    typer.Option(
        "--key", envvar="BOOSTS_MANAGEMENT_KEY", help="Management key, mk_... (default: the demo's)"
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the answer's data as JSON")]
Minutes = Annotated[int, typer.Option(min=1, max=1440, help="How far to look back")]

_HINTS = {
    "payment_method_required": "put a card on file with `boosts billing payment-method pm_card_visa`",
    "pledge_exists": "see it with `boosts pools my-pledge {pool}`",
    "use_billing_portal": "from here: `boosts billing cancel {pool}`",
    "pool_not_found": "`boosts pools list` shows those there are",
    "capacity_undeclared": "a draft takes it with `boosts admin pools edit {pool} -`",
    "not_feasible": "offer fewer seats, a lower guarantee or lower limits, or plan more nodes",
    "operator_required": "give an operator's key with --key or BOOSTS_MANAGEMENT_KEY",
    "unauthorized": "check --key and BOOSTS_MANAGEMENT_KEY",
}
"""What to do next, by the code of a refusal."""


THROUGHPUT_COLUMNS = (
    *("REQUESTS", "TOKENS IN", "OWED OUT", "DELIVERED", "BORROWED", "HELD S", "ATTAINMENT"),
    *("LOWEST 1 S", "10 S", "60 S", "SECONDS KEPT"),
)


class Role(enum.Enum):
    """Whose key of the demo's a command takes when it is given none, as demo.json calls it."""

    CUSTOMER = "customer_key"
    OPERATOR = "operator_key"


@contextlib.contextmanager
def connect(context: typer.Context, url: str | None, key: str | None, role: Role) -> Iterator[Client]:
    """A client for one command. What fails is one line on stderr, and exit status 1."""
    from boosts.client import Client, Refused, Unreachable

    url, key = _address(context, url, key, role, os.environ)
    with Client(url, key) as client:
        try:
            yield client
        except Refused as refused:
            fail(context, _refusal(refused, context.params.get("pool", "POOL")))
        except Unreachable as unreachable:
            fail(context, f"{unreachable}; is it running, and is this the right --url?")


def fail(context: typer.Context, message: str) -> NoReturn:
    """End the command with one line on stderr and exit status 1."""
    print(f"{context.command_path}: {message}", file=sys.stderr)
    raise typer.Exit(1)


def show_json(data: object) -> None:
    print(json.dumps(data, indent=2, ensure_ascii=False))


def show_table(columns: Sequence[str], rows: Sequence[Sequence[object]], empty: str) -> None:
    """A table: drawn on a terminal, aligned words elsewhere."""
    texts = [["-" if cell is None else str(cell) for cell in row] for row in rows]
    if not texts:
        print(empty)
    elif sys.stdout.isatty():
        _draw(columns, texts)
    else:
        widths = [max(map(len, column)) for column in zip(columns, *texts, strict=True)]
        for line in (columns, *texts):
            print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def show_minutes(minutes: Sequence[ThroughputOfMinute], totals: Throughput) -> None:
    """Throughput by minute, and below it the sum."""
    rows = [(one["minute"][:16].replace("T", " "), *throughput_cells(one)) for one in minutes]
    total = [("total", *throughput_cells(totals))] if rows else []
    show_table(("MINUTE (UTC)", *THROUGHPUT_COLUMNS), rows + total, empty="no requests in this time")


def throughput_cells(figures: Throughput) -> tuple[str, ...]:
    """What stands under THROUGHPUT_COLUMNS."""
    return (
        str(figures["requests"]),
        str(figures["inputTokens"]),
        f"{figures['owedTokens']:.0f}",
        str(figures["deliveredTokens"]),
        f"{figures['borrowedTokens']:.0f}",
        f"{figures['heldS']:.1f}",
        *map(
            percent,
            (
                *(figures["attainment"], figures["attainment1s"]),
                *(figures["attainment10s"], figures["attainment60s"]),
            ),
        ),
        f"{figures['owedSeconds'] - figures['missedSeconds']} of {figures['owedSeconds']}",
    )


def percent(share: float | None) -> str:
    """A share as people read it; a dash where there is none."""
    return "-" if share is None else f"{share:.1%}"


def show_fields(fields: Mapping[str, object]) -> None:
    """One thing, a line for each of its fields; those that are None are left out."""
    width = max(map(len, fields))
    for name, value in fields.items():
        if value is not None:
            print(f"{name.ljust(width)}  {value}")


def read_json_file(context: typer.Context, path: Path) -> dict[str, Any]:
    """The object in a file, or on stdin for `-`."""
    try:
        content = json.loads(sys.stdin.read() if str(path) == "-" else path.read_text())
    except (OSError, ValueError) as error:
        fail(context, f"cannot read {path}: {error}")
    if not isinstance(content, dict):
        fail(context, f"{path} holds no JSON object")
    return content


def _draw(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(*columns, box=box.SIMPLE_HEAD)
    for row in rows:
        table.add_row(*map(escape, row))
    Console().print(table)


def _address(
    context: typer.Context, url: str | None, key: str | None, role: Role, environment: Mapping[str, str]
) -> tuple[str, str]:
    """URL and key; what is not given comes from demo.json. Its keys go to its own control plane only."""
    from contract.keys import KeyKind, is_key

    demo = _read_demo(home_folder(environment))
    url = (url or demo.get("control_plane_url") or DEFAULT_URL).rstrip("/")
    if not url.startswith(("http://", "https://")):
        fail(context, f"--url is {url!r}; want http:// or https://")
    if not key and url == demo.get("control_plane_url"):
        key = demo.get(role.value)
    if not key:
        fail(context, "no management key: give --key or BOOSTS_MANAGEMENT_KEY, or start `boosts run` here")
    if not is_key(key, KeyKind.MANAGEMENT):
        fail(context, "the management key is mistyped: it looks like mk_... and carries a checksum")
    return url, key


def _read_demo(home: Path) -> dict[str, str]:
    try:
        content = json.loads(demo_file(home).read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _refusal(refused: Refused, pool: str) -> str:
    message = f"{refused.message.rstrip('.')} ({refused.code})"
    hint = _HINTS.get(refused.code)
    return f"{message}; {hint.format(pool=pool)}" if hint else message
