"""Following a file: good and newer versions are taken, all others leave the last good one in place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from contract.errors import ContractError
from serving.entitlements_file import EntitlementsFile
from tests.contract import documents


def write(path: Path, text: str) -> None:
    fresh = path.with_suffix(".new")
    fresh.write_text(text)
    fresh.replace(path)


@pytest.fixture
def followed(tmp_path: Path) -> EntitlementsFile:
    path = tmp_path / "entitlements.json"
    write(path, json.dumps(documents.entitlements()))
    file = EntitlementsFile(path)
    assert file.load().revision == 3
    return file


def test_unchanged_file_is_not_read_again(followed: EntitlementsFile) -> None:
    assert followed.poll() is None
    assert followed.refused == 0


def test_newer_revision_is_taken(followed: EntitlementsFile) -> None:
    write(followed.path, json.dumps(documents.entitlements(revision=4, pledges=[])))
    snapshot = followed.poll()
    assert snapshot is not None
    assert snapshot.revision == 4
    assert followed.poll() is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "null",
        json.dumps(documents.entitlements(revision=2)),
        json.dumps(documents.entitlements(pledges=[])),
        json.dumps(documents.entitlements(revision=4, version=9)),
    ],
)
def test_bad_or_older_version_is_refused_once_and_the_last_good_stays(
    followed: EntitlementsFile, text: str
) -> None:
    write(followed.path, text)
    assert followed.poll() is None
    assert followed.poll() is None
    assert followed.refused == 1
    assert followed.current is not None
    assert followed.current.revision == 3


def test_another_store_starts_its_own_count(followed: EntitlementsFile) -> None:
    write(followed.path, json.dumps(documents.entitlements(store_id="restored", revision=1)))
    snapshot = followed.poll()
    assert snapshot is not None
    assert snapshot.store_id == "restored"


def test_file_that_vanishes_changes_nothing_and_is_taken_when_it_is_back(followed: EntitlementsFile) -> None:
    followed.path.unlink()
    assert followed.poll() is None
    write(followed.path, json.dumps(documents.entitlements(revision=5)))
    assert followed.poll() is not None


def test_first_load_has_nothing_to_fall_back_on(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        EntitlementsFile(tmp_path / "none.json").load()
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ContractError):
        EntitlementsFile(tmp_path / "bad.json").load()
