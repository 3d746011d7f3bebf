"""What `boosts run` prints for pasting."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from boosts.client import AdminPool
from boosts.settings import StackSettings


def welcome(settings: StackSettings, model: str, key: str | None) -> str:
    """How to use the pool that has just gone live; without a key, how to look at it."""
    boosts = _boosts(settings.home)
    slug = settings.terms.slug
    first = f"Pool {slug} is live, but the demo customer has no seats in it." if key is None else ""
    return f"""
{first or _examples(settings.inference_url, key or "", model)}

Look at the pool, and buy more seats:

{boosts} pools list
{boosts} pools show {slug}

Keys and addresses: {settings.home}/demo.json
Logs: {settings.home}/control-plane.log, {settings.node_home}/agent.log and serving.log
Ctrl-C stops everything.
"""


def funding_message(pool: AdminPool, home: Path) -> str:
    """How far the pool is from going live, and how another customer takes the seats that are missing."""
    slug, boosts = pool["slug"], _boosts(home)
    pledged, wanted = pool["pledgedSlots"], pool["minSeats"]
    block, terms = next(iter(pool["blocks"].items()))
    # The demo customer has one of its seats.
    quantity = max(1, min(wanted - pledged, 20, terms["seats"] - 1))
    return f"""\
pool {slug} is funding: {pledged} of {wanted} seats; another customer can subscribe the rest:

{boosts} admin accounts create "Another customer" another@example.com
export BOOSTS_MANAGEMENT_KEY=   # the key that this printed
{boosts} billing payment-method pm_card_visa
{boosts} pools subscribe {slug} --block {block} --quantity {quantity}
"""


def _examples(url: str, key: str, model: str) -> str:
    return f"""\
The demo pool is live. Try it:

curl {url}/v1/chat/completions \\
  -H "Authorization: Bearer {key}" -H "Content-Type: application/json" \\
  -d '{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello"}}], "max_tokens": 32}}'

{_installed("python")} - <<'END'
from openai import OpenAI
client = OpenAI(base_url="{url}/v1", api_key="{key}")
stream = client.chat.completions.create(
    model="{model}", messages=[{{"role": "user", "content": "Hello"}}], max_tokens=32, stream=True)
print("".join(chunk.choices[0].delta.content or "" for chunk in stream))
END"""


def _boosts(home: Path) -> str:
    """The command, in a way that finds this stack's demo.json."""
    if home == Path("var").absolute():
        return _installed("boosts")
    return f"BOOSTS_HOME={shlex.quote(str(home))} {_installed('boosts')}"


def _installed(program: str) -> str:
    path = Path(sys.executable).parent / program
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
