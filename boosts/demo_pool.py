"""What the demo stack has in its control plane: an operator, a customer, a pool, and seats in it.

All of it is looked for first and made only if it is not there, so a second run finds the first one's.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from agent.home import write_whole
from boosts.client import AdminPool, Client, Pledge, Refused
from boosts.settings import StackError
from contract.blocks import Block
from contract.errors import ContractError
from control_plane.pools.models import PoolTerms

OPERATOR_EMAIL = "operator@localhost"
CUSTOMER_EMAIL = "demo@localhost"
CARD = "pm_card_visa"

DEMO_MODEL = "demo"
DEMO_CAPACITY: dict[str, Any] = {
    "model_id": DEMO_MODEL,
    "base_s": 0.002,
    "prefill_token_s": 4e-5,
    "decode_s": 1.5e-4,
    "kv_token_s": 1.6e-7,
    "slots": 64,
    "kv_tokens": 1_000_000,
}
"""Of a demo node: what `boosts capacity` measured of the demo model on two busy CPU cores, with every time in
it doubled. The machine that it really is on is measured by serving, before the pool goes live."""

_TERMS: dict[str, Any] = {
    "slug": "demo",
    "modelId": DEMO_MODEL,
    "modelName": "Demo",
    "description": "A small model with random weights: it talks nonsense fast. Everything around it is real.",
    "infraSpec": "This machine",
    "blocks": {block.value: {"seats": 10, "monthlyPrice": "27.00"} for block in Block},
    # What the demo customer pledges: one seat in each block.
    "minSeats": 3,
    "guaranteeTokS": 20,
    "rpmLimit": 6_000,
    "tpmLimit": 10_000_000,
    "declaredCapacity": DEMO_CAPACITY,
}


@dataclass(frozen=True, slots=True)
class DemoKeys:
    """The management keys of the demo's operator and of its customer."""

    operator: str
    customer: str


def demo_terms(model: str | None, overrides: Mapping[str, Any]) -> PoolTerms:
    """The demo pool's terms; a model of one's own has a pool of its own. Raises StackError.

    Of such a model it is not known what a node can do, so that nothing is guaranteed until that is declared.
    """
    terms = {**_TERMS, **(_terms_for(model) if model else {}), **overrides}
    if terms["modelId"] != DEMO_MODEL and "declaredCapacity" not in overrides:
        terms |= {"declaredCapacity": None, "guaranteeTokS": overrides.get("guaranteeTokS", 0)}
    try:
        return PoolTerms.model_validate(terms, by_name=False)
    except ValidationError as error:
        raise StackError(str(ContractError.from_validation("BOOSTS_DEMO_POOL", error))) from None


def read_overrides(file: Path) -> dict[str, Any]:
    """The fields in the file of BOOSTS_DEMO_POOL. Raises StackError."""
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise StackError(f"BOOSTS_DEMO_POOL: cannot read {file}: {error}") from None
    if not isinstance(content, dict):
        raise StackError(f"BOOSTS_DEMO_POOL: {file} holds no JSON object")
    return content


def _terms_for(model: str) -> dict[str, Any]:
    name = model.rstrip("/").rpartition("/")[2]
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:100].rstrip("-")
    return {
        "slug": slug or "model",
        "modelId": model,
        "modelName": name or model,
        "description": f"{name or model}, on this machine.",
    }


def find_keys(
    home: Path, url: str, new_operator_key: Callable[[], str], say: Callable[[str], None]
) -> DemoKeys:
    """The demo's keys: those of the last run where they still open this control plane, else new ones.

    Raises ClientError.
    """
    kept = _KeptKeys(home / "demo-accounts.json")
    operator = kept.read("operator")
    if operator is None or not _opens(url, operator, Client.accounts):
        operator = new_operator_key()
        kept.write("operator", operator)
    customer = kept.read("customer")
    if customer is None or not _opens(url, customer, Client.pools):
        with Client(url, operator) as client:
            customer = _new_customer(client, say)
        kept.write("customer", customer)
    return DemoKeys(operator, customer)


def open_pool(client: Client, terms: PoolTerms, say: Callable[[str], None]) -> AdminPool:
    """The pool with the slug of `terms`, open. Raises ClientError."""
    asked = terms.model_dump(mode="json", by_alias=True)
    pool = next((pool for pool in client.admin_pools() if pool["slug"] == terms.slug), None)
    if pool is None:
        pool = client.create_pool(asked)
    others = differing_terms(pool, terms)
    if pool["status"] == "draft":
        if others:
            client.edit_pool(pool["id"], asked)
        return client.open_pool(pool["id"])
    if others:
        say(
            f"pool {terms.slug} keeps its terms, which are fixed since it was opened; asked for were other "
            f"{', '.join(others)}: choose another slug or BOOSTS_HOME for those"
        )
    return pool


def differing_terms(pool: AdminPool, terms: PoolTerms) -> list[str]:
    """The fields, as the API names them, in which an existing pool differs from `terms`."""
    fields = {name: field.alias or name for name, field in PoolTerms.model_fields.items()}
    has = PoolTerms.model_validate(
        {alias: value for alias, value in pool.items() if alias in fields.values()}
    )
    return [
        alias
        for name, alias in fields.items()
        if (
            has.engine_flags != terms.engine_flags
            if name == "engine_args"
            else getattr(has, name) != getattr(terms, name)
        )
    ]


def take_seats(client: Client, pool: AdminPool, say: Callable[[str], None]) -> None:
    """One seat in every block of the pool for the demo customer. Raises ClientError."""
    if find_pledge(client, pool["slug"]) is not None:
        return
    client.set_payment_method(CARD)
    try:
        client.subscribe(pool["slug"], list(pool["blocks"]), quantity=1)
    except Refused as refused:
        if refused.status != 409:
            raise
        say(f"the demo customer gets no seats: {refused.message}")


def find_pledge(client: Client, slug: str) -> Pledge | None:
    """The customer's pledge in the pool, if there is one. Raises ClientError."""
    try:
        return client.my_pledge(slug)
    except Refused as refused:
        if refused.status == 404:
            return None
        raise


def _opens(url: str, key: str, look: Callable[[Client], object]) -> bool:
    with Client(url, key) as client:
        try:
            look(client)
        except Refused as refused:
            if refused.status in (401, 403):
                return False
            raise
    return True


def _new_customer(client: Client, say: Callable[[str], None]) -> str:
    try:
        return client.create_account("demo", CUSTOMER_EMAIL)["managementKey"]
    except Refused as refused:
        if refused.status != 409:
            raise
    # A customer's key is shown once; who lost it is a new customer.
    email = f"demo-{secrets.token_hex(4)}@localhost"
    say(f"the key of {CUSTOMER_EMAIL} is lost: the demo customer is {email} from now on")
    return client.create_account("demo", email)["managementKey"]


class _KeptKeys:
    """Management keys on the disk: they are shown once, so each is kept as soon as it is made."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self, name: str) -> str | None:
        key = self._all().get(name)
        return key if isinstance(key, str) else None

    def write(self, name: str, key: str) -> None:
        write_whole(self._path, json.dumps({**self._all(), name: key}, indent=2) + "\n")

    def _all(self) -> dict[str, Any]:
        try:
            content = json.loads(self._path.read_text())
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}
