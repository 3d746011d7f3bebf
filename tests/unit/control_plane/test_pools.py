"""What a pool is, to those who buy and to the operator who sells it."""

from __future__ import annotations

import uuid
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from control_plane.pools.models import PoolTerms
from tests.contract.documents import capacity
from tests.unit.control_plane.market import (
    Market,
    at_once,
    empty_ground,  # noqa: F401 - a fixture
    on_sqlite_only,
    open_market,  # noqa: F401 - a fixture
    terms,
)

SUMMARY = {
    "id",
    "slug",
    "modelId",
    "modelName",
    "description",
    "infraSpec",
    "status",
    "totalSlots",
    "pledgedSlots",
    "minPricePerDay",
}
DETAIL = SUMMARY | {"minSeats", "guaranteeTokS", "rpmLimit", "tpmLimit", "blocks", "hourSlots"}
TWO_BLOCKS = {"night": (2, "27.00"), "americas": (1, "10.01")}


# --- what customers see ----------------------------------------------------------------------------


async def test_the_list_shows_every_pool_but_drafts_oldest_first(market: Market) -> None:
    customer = await market.customer()
    await market.draft()
    ids = []
    for _ in range(3):
        ids.append(await market.pool(blocks=TWO_BLOCKS))
        market.clock.advance(1)
    listed = (await customer.call("GET", "/api/pools")).data
    assert [pool["id"] for pool in listed] == ids
    assert all(set(pool) == SUMMARY for pool in listed)
    [first, *_] = listed
    assert first["totalSlots"] == 3
    assert first["pledgedSlots"] == 0
    assert first["minPricePerDay"] == "10.01"
    assert first["status"] == "funding"
    assert (first["modelId"], first["modelName"]) == ("org/model", "Model")
    assert (first["description"], first["infraSpec"]) == ("A model.", "8x H100")


@on_sqlite_only
async def test_a_pool_is_read_by_id_and_by_slug(market: Market) -> None:
    customer = await market.customer()
    pool_id = await market.pool(slug="qwen3-397b-a17b", blocks=TWO_BLOCKS)
    detail = (await customer.call("GET", f"/api/pools/{pool_id}")).data
    assert detail == (await customer.call("GET", "/api/pools/qwen3-397b-a17b")).data
    assert set(detail) == DETAIL
    assert detail["blocks"] == {
        "night": {"seats": 2, "available": 2, "monthlyPrice": "27.00"},
        "americas": {"seats": 1, "available": 1, "monthlyPrice": "10.01"},
    }
    assert (detail["rpmLimit"], detail["tpmLimit"], detail["guaranteeTokS"]) == (60, 100_000, 50.0)


@on_sqlite_only
async def test_every_hour_of_every_seat_is_shown_with_its_share_of_the_price(market: Market) -> None:
    customer = await market.customer()
    pool_id = await market.pool(blocks=TWO_BLOCKS)
    slots = (await customer.call("GET", f"/api/pools/{pool_id}")).data["hourSlots"]
    assert all(set(slot) == {"id", "hour", "slotIndex", "pricePerDay", "status"} for slot in slots)
    seats = {(hour, 0) for hour in (*range(8), *range(16, 24))} | {(hour, 1) for hour in range(8)}
    assert [(slot["slotIndex"], slot["hour"]) for slot in slots] == sorted((i, h) for h, i in seats)
    assert [slot["pricePerDay"] for slot in slots[:8]] == ["3.38", "3.37"] * 4
    assert sum(int(slot["pricePerDay"].replace(".", "")) for slot in slots) == 2 * 2700 + 1001
    assert len({uuid.UUID(slot["id"]) for slot in slots}) == len(slots)
    again = (await customer.call("GET", f"/api/pools/{pool_id}")).data["hourSlots"]
    assert again == slots


async def test_hour_slots_show_who_is_there(market: Market) -> None:
    pool_id = await market.pool(min_seats=3, blocks={"night": (4, 1)})
    customers = [await market.customer() for _ in range(3)]
    _ = (await customers[0].subscribe(pool_id, quantity=2)).data
    path = f"/api/pools/{pool_id}"

    async def statuses() -> list[str]:
        slots = (await customers[0].call("GET", path)).data["hourSlots"]
        return [slot["status"] for slot in slots if slot["hour"] == 0]

    assert await statuses() == ["pledged", "pledged", "available", "available"]
    await market.node(pool_id)
    _ = (await customers[1].subscribe(pool_id)).data
    await market.settle()
    assert await statuses() == ["active", "active", "active", "available"]
    await customers[1].put_card("pm_card_chargeDeclined")
    await market.wait(days=32)
    assert await statuses() == ["active", "active", "active", "available"]
    assert (await customers[0].call("GET", path)).data["blocks"]["night"]["available"] == 1
    assert (await customers[0].call("GET", path)).data["pledgedSlots"] == 3
    [listed] = (await customers[0].call("GET", "/api/pools")).data
    assert listed["pledgedSlots"] == 3


async def test_a_draft_and_what_is_no_pool_are_not_found(market: Market) -> None:
    customer = await market.customer()
    nowhere = (await market.draft(), "none", str(uuid.uuid4()), "x" * 3_000, "%C3%A9", "%F0%9F%92%A9")
    for method, path in (
        ("GET", ""),
        ("GET", "/my-pledge"),
        ("GET", "/my-key"),
        ("GET", "/my-throughput"),
        ("DELETE", "/pledge"),
        ("POST", "/subscribe"),
    ):
        body = {"blocks": ["night"]} if method == "POST" else None
        for pool in nowhere:
            answer = await customer.call(method, f"/api/pools/{pool}{path}", body)
            assert answer.refusal == (404, "pool_not_found"), (path, pool)
        answer = await customer.call(method, f"/api/pools/%00{path}", body)
        assert answer.refusal == (422, "invalid_request")


# --- what operators do -----------------------------------------------------------------------------


@on_sqlite_only
async def test_an_operator_sees_what_was_offered(market: Market) -> None:
    made = (await market.operate("POST", "/pools", terms(slug="a", min_seats=3, blocks=TWO_BLOCKS))).data
    assert made == {
        "id": made["id"],
        "status": "draft",
        "slug": "a",
        "modelId": "org/model",
        "modelName": "Model",
        "description": "A model.",
        "infraSpec": "8x H100",
        "blocks": {
            "night": {"seats": 2, "monthlyPrice": "27.00"},
            "americas": {"seats": 1, "monthlyPrice": "10.01"},
        },
        "minSeats": 3,
        "guaranteeTokS": 50.0,
        "prefillTokS": 1000.0,
        "rpmLimit": 60,
        "tpmLimit": 100_000,
        "engineArgs": ["--max-num-seqs", "64"],
        "nodes": 1,
        "declaredCapacity": {
            **capacity(),
            **{"experts_s": 0.0, "active_share": 0.0, "error": None, "measured_at": None},
        },
        "contextTokens": 2048,
        "capacityMargin": 0.1,
        "feasibility": {
            "seats": 2,
            "fits": True,
            "fails": [],
            "mostSeats": 184,
            "slots": 256,
            "stepNeededMs": 5.141,
            "stepAllowedMs": 18.0,
            "prefillTokensPerStep": 40.0,
            "kvTokensNeeded": 4096,
            "kvTokens": 4_000_000,
        },
        "activationProblem": None,
        "alarms": [],
        "attainment60s": None,
        "pledgedSlots": 0,
        "revision": 1,
    }
    assert (await market.operate("GET", "/pools/a")).data == made
    assert (await market.operate("GET", "/pools")).data == [made]


BAD_TERMS: list[tuple[dict[str, Any], str]] = [
    ({"slug": "Upper"}, "slug"),
    ({"slug": "-a"}, "slug"),
    ({"slug": "a\n"}, "slug"),
    ({"slug": ""}, "slug"),
    ({"slug": "a" * 101}, "slug"),
    ({"slug": None}, "slug"),
    ({"modelId": ""}, "modelId"),
    ({"modelId": "\x00"}, "modelId"),
    ({"modelName": 1}, "modelName"),
    ({"description": "x" * 5001}, "description"),
    ({"blocks": {}}, "blocks"),
    ({"blocks": {"noon": {"seats": 1, "monthlyPrice": 1}}}, "blocks"),
    ({"blocks": {"night": {"seats": 0, "monthlyPrice": 1}}}, "blocks"),
    ({"blocks": {"night": {"seats": 1001, "monthlyPrice": 1}}}, "blocks"),
    ({"blocks": {"night": {"seats": 2, "monthlyPrice": "1.001"}}}, "blocks"),
    ({"blocks": {"night": {"seats": 2, "monthlyPrice": -1}}}, "blocks"),
    ({"blocks": {"night": {"seats": 2, "monthlyPrice": "1000000.01"}}}, "blocks"),
    ({"blocks": {"night": {"seats": 2, "monthlyPrice": "NaN"}}}, "blocks"),
    ({"blocks": {"night": {"seats": 2}}}, "blocks"),
    ({"minSeats": 0}, "minSeats"),
    ({"minSeats": 31}, ""),
    ({"minSeats": "many"}, "minSeats"),
    ({"guaranteeTokS": -1}, "guaranteeTokS"),
    ({"prefillTokS": 0}, "prefillTokS"),
    ({"rpmLimit": 0}, "rpmLimit"),
    ({"tpmLimit": 10**9 + 1}, "tpmLimit"),
    ({"engineArgs": "--x"}, "engineArgs"),
    ({"engineArgs": {"x": None}}, "engineArgs"),
    ({"engineArgs": ["\x00"]}, "engineArgs"),
    ({"status": "active"}, "status"),
    ({"model_name": "snake"}, "model_name"),
]
"""Each with the field that the refusal names."""


@on_sqlite_only
async def test_terms_that_make_no_sense_are_refused_at_first_and_later(market: Market) -> None:
    draft = await market.draft()
    for change, field in BAD_TERMS:
        for answer in (
            await market.operate("POST", "/pools", {**terms(), **change}),
            await market.operate("PATCH", f"/pools/{draft}", change),
        ):
            assert answer.refusal == (422, "invalid_request"), change
            assert any(field in fault["field"] for fault in answer.error["details"]), change
    assert len((await market.operate("GET", "/pools")).data) == 1


@given(st.decimals(0, 1_000_000, places=2))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_price_with_two_decimals_is_kept_to_the_cent(price: Any) -> None:
    offer = terms(blocks={"night": (2, str(price))})
    [kept] = PoolTerms.model_validate(offer).blocks.values()
    assert kept.price_cents == round(price * 100)


async def test_a_draft_is_edited_field_by_field(market: Market) -> None:
    draft = await market.draft(slug="before")
    before = (await market.operate("GET", "/pools/before")).data
    changes = {"slug": "after", "blocks": {"europe": {"seats": 4, "monthlyPrice": 5}}, "minSeats": 4}
    edited = (await market.operate("PATCH", f"/pools/{draft}", changes)).data
    blocks = {"europe": {"seats": 4, "monthlyPrice": "5.00"}}
    changed = {"slug": "after", "blocks": blocks, "minSeats": 4, "revision": edited["revision"]}
    assert edited["feasibility"]["seats"] == 4
    assert {**edited, "feasibility": None} == {**before, **changed, "feasibility": None}
    assert edited["revision"] > before["revision"]
    assert (await market.operate("GET", "/pools/before")).refusal == (404, "pool_not_found")
    assert (await market.operate("PATCH", "/pools/after", {})).data["blocks"] == blocks


@on_sqlite_only
async def test_engine_arguments_may_be_named(market: Market) -> None:
    named = {
        "max_num_seqs": 256,
        "enforce-eager": True,
        "--swap-space": 0.5,
        "dtype": "half",
        "off": False,
    }
    pool_id = await market.draft(engine_args=named)
    shown = (await market.operate("GET", f"/pools/{pool_id}")).data["engineArgs"]
    assert shown == [*("--max-num-seqs", "256", "--enforce-eager", "--swap-space", "0.5", "--dtype", "half")]


@on_sqlite_only
async def test_an_open_pool_stays_as_it_was_offered_but_for_its_engine(market: Market) -> None:
    pool_id = await market.pool()
    before = (await market.operate("GET", f"/pools/{pool_id}")).data
    refused: list[dict[str, Any]] = [{"rpmLimit": 1}, {"rpmLimit": 1, "engineArgs": []}, {"slug": "another"}]
    for changes in refused:
        answer = await market.operate("PATCH", f"/pools/{pool_id}", changes)
        assert answer.refusal == (409, "wrong_pool_status")
        assert (await market.operate("GET", f"/pools/{pool_id}")).data == before
    edited = (await market.operate("PATCH", f"/pools/{pool_id}", {"engineArgs": ["--x"]})).data
    assert edited == {**before, "engineArgs": ["--x"], "revision": edited["revision"]}
    assert edited["revision"] > before["revision"]


@on_sqlite_only
async def test_a_pools_status_moves_along_its_arrows_only(market: Market) -> None:
    draft, funding, active = await market.draft(), await market.pool(), await market.live_pool()
    paused = await market.live_pool()
    _ = (await market.operate("POST", f"/pools/{paused}/pause")).data
    allowed = {("draft", "open"): "funding", ("active", "pause"): "paused", ("paused", "resume"): "active"}
    for pool_id, status in ((draft, "draft"), (funding, "funding"), (active, "active"), (paused, "paused")):
        for action in ("open", "pause", "resume"):
            if (status, action) not in allowed:
                answer = await market.operate("POST", f"/pools/{pool_id}/{action}")
                assert answer.refusal == (409, "wrong_pool_status")
                assert answer.error["details"] == {"status": status}
                assert await market.status(pool_id) == status
    for (status, action), then in allowed.items():
        pool_id = {"draft": draft, "active": active, "paused": paused}[status]
        assert (await market.operate("POST", f"/pools/{pool_id}/{action}")).data["status"] == then


async def test_a_slug_names_one_pool(market: Market) -> None:
    first = await market.draft(slug="taken")
    second = await market.draft()
    taken = (409, "slug_taken")
    assert (await market.operate("POST", "/pools", terms(slug="taken"))).refusal == taken
    assert (await market.operate("PATCH", f"/pools/{second}", {"slug": "taken"})).refusal == taken
    assert (await market.operate("PATCH", f"/pools/{first}", {"slug": "taken"})).status == 200
    calls = [market.operate("PATCH", f"/pools/{each}", {"slug": "wanted"}) for each in (first, second)]
    assert sorted(answer.status for answer in await at_once(*calls)) == [200, 409]
    calls = [market.operate("POST", "/pools", terms(slug="another")) for _ in range(3)]
    assert sorted(answer.status for answer in await at_once(*calls)) == [200, 409, 409]


@on_sqlite_only
async def test_a_slug_is_no_other_pools_id(market: Market) -> None:
    first = await market.draft()
    for slug in (first, str(uuid.uuid4())):
        answer = await market.operate("POST", "/pools", terms(slug=slug))
        assert answer.refusal == (422, "invalid_request")
    assert (await market.operate("PATCH", f"/pools/{first}", {"slug": first})).status == 422


async def test_a_pool_opened_twice_at_once_has_its_seats_once(market: Market) -> None:
    pool_id = await market.draft(blocks={"night": (3, 1)})
    answers = await at_once(*[market.operate("POST", f"/pools/{pool_id}/open") for _ in range(3)])
    assert sorted(answer.status for answer in answers) == [200, 409, 409]
    assert await market.rows("SELECT count(*) FROM seats") == [(3,)]
