"""Where files go, and how a folder tells later where it came from."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from phimlx.hub.client import RemoteFile, Repository
from phimlx.hub.destination import (
    CacheDestination,
    DownloadRecord,
    FolderDestination,
    origin_of,
    read_record,
    record_path,
)

COMMIT = "0123456789" * 4
FILES = (RemoteFile("config.json", 2, "a" * 40), RemoteFile("model.safetensors", 9, "b" * 64))
REPOSITORY = Repository("old/name", "new/name", "v1", COMMIT, FILES)


def test_a_folder_remembers_what_it_should_hold(tmp_path: Path) -> None:
    assert read_record(tmp_path) is None
    assert origin_of(tmp_path) is None
    FolderDestination(tmp_path, REPOSITORY).finish(FILES)
    known = {file.name: file for file in FILES}
    assert read_record(tmp_path) == DownloadRecord("new/name", COMMIT, known)
    assert origin_of(tmp_path) == ("new/name", COMMIT)
    assert json.loads(record_path(tmp_path).read_text()) == {
        "repository": "new/name",
        "revision": "v1",
        "commit": COMMIT,
        "files": {
            "config.json": {"size": 2, "hash": "a" * 40},
            "model.safetensors": {"size": 9, "hash": "b" * 64},
        },
    }


@pytest.mark.parametrize(
    ("revision", "noted"), [("v1", True), ("refs/pr/1", True), (COMMIT, False)]
)
def test_a_cache_notes_the_commit_of_a_branch(tmp_path: Path, revision: str, noted: bool) -> None:
    repository = Repository("old/name", "new/name", revision, COMMIT, FILES)
    place = CacheDestination(tmp_path, repository)
    place.finish(FILES)
    assert place.home.noted_commit(revision) == (COMMIT if noted else None)
    assert origin_of(place.folder) == ("old/name", COMMIT)
    if noted:
        assert stat.S_IMODE(place.home.ref(revision).stat().st_mode) & 0o400


def test_a_snapshot_that_is_no_commit_tells_nothing(tmp_path: Path) -> None:
    assert origin_of(tmp_path / "models--a--b" / "snapshots" / "main") is None


def test_a_data_set_has_a_place_of_its_own(tmp_path: Path) -> None:
    repository = Repository("o/d", "o/d", "main", COMMIT, FILES, "dataset")
    place = CacheDestination(tmp_path, repository)
    assert place.folder == tmp_path / "datasets--o--d" / "snapshots" / COMMIT
    assert place.content(FILES[0]) == tmp_path / "datasets--o--d" / "blobs" / ("a" * 40)
