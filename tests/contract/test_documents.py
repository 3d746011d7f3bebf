"""Entitlements, reports and keys: good ones survive a round trip, bad ones are named by their fault."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contract.entitlements import parse_entitlements
from contract.errors import ContractError
from contract.keys import KeyKind, is_key, key_sha256, new_key
from contract.reports import parse_report
from tests.contract import documents
from tests.contract.documents import pledge


def test_entitlements_survive_a_round_trip() -> None:
    parsed = parse_entitlements(json.dumps(documents.entitlements()))
    assert parse_entitlements(parsed.to_json()) == parsed


def test_reports_survive_a_round_trip() -> None:
    parsed = parse_report(json.dumps(documents.report()))
    assert parse_report(parsed.model_dump_json()) == parsed


def test_a_report_of_before_the_whole_ledger_is_still_read() -> None:
    """Such reports wait in the spools of nodes."""
    [seat] = parse_report(json.dumps(documents.report())).seats
    assert (seat.borrowed_tokens, seat.held_s, seat.attainment_1s, seat.attainment_10s) == (0, 0, None, None)
    assert (seat.owed_seconds, seat.missed_seconds) == (0, 0)


def test_reports_carry_the_whole_ledger_and_the_capacity() -> None:
    report = documents.report(capacity=documents.measured())
    more = {"borrowed_tokens": 3.5, "held_s": 0.25, "attainment_1s": 0.5, "attainment_10s": 0.75}
    more |= {"owed_seconds": 100, "missed_seconds": 1}
    report["seats"][0] |= more
    parsed = parse_report(json.dumps(report))
    assert parse_report(parsed.model_dump_json()) == parsed
    assert parsed.seats[0].held_s == 0.25
    assert (parsed.seats[0].owed_seconds, parsed.seats[0].missed_seconds) == (100, 1)
    assert parsed.capacity is not None
    assert parsed.capacity.slots == 256


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"version": 2}, "version"),
        ({"revision": 0}, "revision"),
        ({"revision": "3"}, "revision"),
        ({"surprise": 1}, "surprise"),
        ({"store_id": ""}, "store_id"),
        ({"pledges": [pledge("a", "0", quantity=21)]}, "pledges.0.quantity"),
        ({"pledges": [pledge("a", "0", quantity=True)]}, "pledges.0.quantity"),
        ({"pledges": [pledge("a", "0", rpm_limit=0)]}, "pledges.0.rpm_limit"),
        ({"pledges": [pledge("a", "x")]}, "pledges.0.key_sha256"),
        ({"pledges": [pledge("a", "0", status="canceled")]}, "pledges.0.status"),
        ({"pledges": [pledge("a", "0", blocks=[])]}, "pledges.0.blocks"),
        ({"pledges": [pledge("a", "0", valid_until="2030-01-01T00:00:00")]}, "pledges.0.valid_until"),
        (
            {"pledges": [pledge("a", "0", blocks=[{"block": "dawn", "starts": "00:00", "ends": "01:00"}])]},
            "pledges.0.blocks.0.block",
        ),
        (
            {"pledges": [pledge("a", "0", blocks=[{"block": "night", "starts": "08:00", "ends": "00:00"}])]},
            "start before it ends",
        ),
        ({"pledges": [pledge("a", "0"), pledge("a", "1")]}, "pledge_id 'a' stands twice"),
        ({"pledges": [pledge("a", "0"), pledge("b", "0")]}, "stands twice"),
    ],
)
def test_a_fault_in_entitlements_is_told_with_its_place(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ContractError) as error:
        parse_entitlements(json.dumps(documents.entitlements(**changes)))
    assert str(error.value).startswith("entitlements: ")
    assert told in str(error.value)


@pytest.mark.parametrize("missing", sorted(documents.entitlements()))
def test_every_field_of_entitlements_is_needed(missing: str) -> None:
    document = documents.entitlements()
    del document[missing]
    with pytest.raises(ContractError, match=missing):
        parse_entitlements(json.dumps(document))


@pytest.mark.parametrize("changes", [{"sequence": 0}, {"seats": [{}]}, {"at": "yesterday"}, {"more": 1}])
def test_a_fault_in_a_report_is_told(changes: dict[str, Any]) -> None:
    with pytest.raises(ContractError, match=next(iter(changes))):
        parse_report(json.dumps(documents.report(**changes)))


@given(st.binary(max_size=200))
def test_garbage_is_refused_with_our_own_error(content: bytes) -> None:
    with pytest.raises(ContractError):
        parse_entitlements(content)


def test_long_lists_of_faults_are_cut() -> None:
    pledges = [pledge(str(number), "x") for number in range(100)]
    with pytest.raises(ContractError, match="and 95 more"):
        parse_entitlements(json.dumps(documents.entitlements(pledges=pledges)))


def test_keys_are_their_own_and_checked() -> None:
    keys = {new_key(KeyKind.BOOST) for _ in range(100)}
    assert len(keys) == 100
    for key in keys:
        assert key.startswith("sk_pool_")
        assert is_key(key, KeyKind.BOOST)
        assert len(key_sha256(key)) == 64


@given(st.integers(8, 56), st.sampled_from("0Az"))
def test_one_mistyped_letter_is_noticed(position: int, letter: str) -> None:
    key = new_key(KeyKind.BOOST)
    mistyped = key[:position] + letter + key[position + 1 :]
    assert is_key(mistyped, KeyKind.BOOST) == (mistyped == key)


@pytest.mark.parametrize("text", ["", "sk_pool_", "mk_" + "0" * 54, "sk_pool_" + "é" * 49])
def test_other_texts_are_no_keys(text: str) -> None:
    assert not is_key(text, KeyKind.BOOST)
