"""Feasibility: what fits keeps fitting when less is asked, and the figures say why something does not."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contract.capacity import (
    Bound,
    NodeCapacity,
    Promise,
    feasibility,
    judge,
    parse_capacity,
)
from contract.errors import ContractError
from tests.contract import documents

H100 = NodeCapacity(
    model_id="qwen3-8b",
    base_s=0.0072,
    prefill_token_s=2.15e-5,
    decode_s=1.2e-5,
    kv_token_s=4.6e-8,
    slots=256,
    kv_tokens=400_000,
)

capacities = st.builds(
    NodeCapacity,
    model_id=st.just("m"),
    base_s=st.floats(0, 0.1),
    prefill_token_s=st.floats(0, 1e-3),
    decode_s=st.floats(0, 1e-2),
    kv_token_s=st.floats(0, 1e-5),
    experts_s=st.floats(0, 0.1),
    active_share=st.floats(0, 1),
    slots=st.integers(1, 2_000),
    kv_tokens=st.integers(1, 10_000_000),
    step_tokens=st.none() | st.integers(1, 20_000),
)
promises = st.builds(
    Promise,
    guarantee_tok_s=st.floats(0, 1e4),
    tpm_limit=st.integers(1, 10_000_000),
    prefill_tok_s=st.floats(1e-3, 1e6),
    context_tokens=st.integers(1, 100_000),
    margin=st.floats(0, 0.99),
)
seats = st.integers(0, 3_000)


@given(capacities, promises, seats, seats)
def test_fewer_seats_fit_wherever_more_do(c: NodeCapacity, promise: Promise, one: int, other: int) -> None:
    few, many = sorted((one, other))
    assert judge(c, promise, few).fits or not judge(c, promise, many).fits


@given(capacities, promises, seats, st.floats(0, 1e4))
def test_what_keeps_a_guarantee_keeps_a_lower_one(
    c: NodeCapacity, promise: Promise, count: int, other: float
) -> None:
    low, high = sorted((promise.guarantee_tok_s, other))
    slow, fast = replace(promise, guarantee_tok_s=low), replace(promise, guarantee_tok_s=high)
    assert judge(c, slow, count).fits or not judge(c, fast, count).fits


@given(capacities, promises, seats, st.floats(0, 0.99))
def test_what_fits_with_a_margin_fits_with_a_smaller_one(
    c: NodeCapacity, promise: Promise, count: int, other: float
) -> None:
    small, large = sorted((promise.margin, other))
    assert (
        judge(c, replace(promise, margin=small), count).fits
        or not judge(c, replace(promise, margin=large), count).fits
    )


@given(capacities, promises, seats)
def test_the_most_seats_are_the_last_that_fit(c: NodeCapacity, promise: Promise, count: int) -> None:
    judged = judge(c, promise, count)
    if judged.most_seats is None:
        assert promise.guarantee_tok_s == 0
        assert judged.fits
        return
    assert judged.fits == (count <= judged.most_seats)
    assert judge(c, promise, judged.most_seats).fits
    assert not judge(c, promise, judged.most_seats + 1).fits


@given(st.floats(0.1, 1e4), st.floats(0, 0.99), st.integers(1, 256))
def test_a_step_may_take_the_pace_less_the_margin_and_no_more(
    guarantee: float, margin: float, n: int
) -> None:
    allowed_s = (1 - margin) / guarantee
    for share, fits in ((0.99, True), (1.01, False)):
        # Half of it is the same for any number of seats, half is for each.
        half_s = share * allowed_s / 2
        machine = H100.model_copy(
            update={"base_s": half_s, "decode_s": half_s / n, "prefill_token_s": 0.0, "kv_token_s": 0.0}
        )
        promise = Promise(guarantee, 60_000, 1_000.0, context_tokens=1, margin=margin)
        assert judge(machine, promise, n).fits == fits


@given(capacities, seats)
def test_where_nothing_is_guaranteed_any_number_of_seats_fits(c: NodeCapacity, count: int) -> None:
    judged = feasibility(c, seats=count, guarantee_tok_s=0, tpm_limit=60, prefill_tok_s=1)
    assert judged.fits
    assert judged.most_seats is None
    assert str(judged) == "nothing is guaranteed"


def test_a_step_holds_every_seats_stream_and_the_prompts_that_their_limits_allow() -> None:
    judged = feasibility(
        H100, seats=20, guarantee_tok_s=30, tpm_limit=6_000, prefill_tok_s=1_000, context_tokens=1_000
    )
    # 20 seats of 100 prompt tokens per second, in steps of a thirtieth of a second.
    assert judged.prefill_tokens_per_step == pytest.approx(20 * 100 / 30)
    expected_s = 0.0072 + 2.15e-5 * 20 * 100 / 30 + 1.2e-5 * 20 + 4.6e-8 * 20_000
    assert judged.step_needed_ms == pytest.approx(1000 * expected_s)
    assert judged.step_allowed_ms == pytest.approx(0.9 * 1000 / 30)
    assert (judged.kv_tokens_needed, judged.kv_tokens) == (20_000, 400_000)
    assert judged.fits


@pytest.mark.parametrize("limit", [{"tpm_limit": 60_000}, {"prefill_tok_s": 1_000.0}])
def test_prompts_are_counted_by_the_lower_of_the_two_limits(limit: dict[str, Any]) -> None:
    asked = {"tpm_limit": 6_000_000, "prefill_tok_s": 100_000.0} | limit
    judged = feasibility(H100, seats=1, guarantee_tok_s=10, **asked)
    assert judged.prefill_tokens_per_step == pytest.approx(100)


@pytest.mark.parametrize(
    ("changes", "asked", "bound"),
    [
        ({"slots": 9}, {}, Bound.SLOTS),
        ({"kv_tokens": 20_479}, {}, Bound.KV_TOKENS),
        ({"base_s": 0.05}, {}, Bound.STEP_TIME),
        ({}, {"guarantee_tok_s": 130}, Bound.STEP_TIME),
        ({}, {"margin": 0.75}, Bound.STEP_TIME),
        # Each sequence touches an eighth of the experts: ten of them nearly all.
        ({"experts_s": 0.03, "active_share": 0.125}, {}, Bound.STEP_TIME),
        # 10,000 prompt tokens per second in steps of 90: each may take 9 ms less the margin, and takes more.
        ({"step_tokens": 100}, {"tpm_limit": 60_000}, Bound.STEP_TOKENS),
        ({"step_tokens": 10}, {}, Bound.STEP_TOKENS),
    ],
)
def test_it_says_which_bound_is_broken(changes: dict[str, Any], asked: dict[str, Any], bound: Bound) -> None:
    terms = {"seats": 10, "guarantee_tok_s": 30, "tpm_limit": 6_000, "prefill_tok_s": 1_000.0} | asked
    judged = feasibility(H100.model_copy(update=changes), **terms)
    assert judged.fails == (bound,)
    assert judged.most_seats is not None
    assert judged.most_seats < 10
    assert f"{judged.most_seats} seats would fit" in str(judged)
    assert feasibility(H100, **(terms | {"guarantee_tok_s": 30, "margin": 0.1})).fits


def test_a_step_that_takes_fewer_prompt_tokens_has_to_be_shorter() -> None:
    promise = Promise(guarantee_tok_s=30, tpm_limit=60_000, prefill_tok_s=1_000.0)
    judged = judge(H100.model_copy(update={"step_tokens": 210}), promise, 10)
    assert judged.prefill_tokens_per_step == 200
    assert judged.step_allowed_ms == pytest.approx(0.9 * 1000 * 200 / 10_000)
    assert judged.fits
    # With as many tokens as come in the time of the pace, that time is the bound.
    enough = judge(H100.model_copy(update={"step_tokens": 344}), promise, 10)
    assert enough.step_allowed_ms == pytest.approx(0.9 * 1000 / 30)


def test_a_capacity_may_leave_the_tokens_of_a_step_out() -> None:
    known = documents.capacity()
    del known["step_tokens"]
    assert parse_capacity(json.dumps(known)).step_tokens is None


def test_a_capacity_survives_a_round_trip_also_through_parsed_json() -> None:
    text = json.dumps(documents.measured(experts_s=0.01, active_share=0.1))
    parsed = parse_capacity(text)
    assert parse_capacity(parsed.model_dump_json()) == parsed
    # A server has read the JSON already when it is checked.
    assert NodeCapacity.model_validate(json.loads(text)) == parsed


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"base_s": -1e-9}, "base_s"),
        ({"slots": 0}, "slots"),
        ({"slots": "64"}, "slots"),
        ({"kv_tokens": 0}, "kv_tokens"),
        ({"step_tokens": 0}, "step_tokens"),
        ({"active_share": 1.1}, "active_share"),
        ({"model_id": ""}, "model_id"),
        ({"measured_at": "2026-01-01T00:00:00"}, "measured_at"),
        ({"tokens": 1}, "tokens"),
    ],
)
def test_a_fault_in_a_capacity_is_told_with_its_place(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ContractError, match=f"capacity: {told}"):
        parse_capacity(json.dumps(documents.capacity(**changes)))
