"""The layout of huggingface_hub's cache, beside huggingface_hub itself."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from huggingface_hub.file_download import repo_folder_name

from phimlx.hub import layout
from phimlx.hub.layout import RepositoryFolder, RepositoryType

COMMIT = "0123456789" * 4


@pytest.mark.parametrize("name", ["microsoft/phi-4", "a/b.c-d_e", "mlx-community/Phi-4-mini-4bit"])
@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_folders_are_named_as_huggingface_hub_names_them(name: str, kind: RepositoryType) -> None:
    home = RepositoryFolder(Path("/hub"), name, kind)
    assert home.path == Path("/hub") / repo_folder_name(repo_id=name, repo_type=kind)
    place = layout.place_of(home.snapshot(COMMIT))
    assert place == ((name, COMMIT) if kind == "model" else None)
    assert layout.home_of(home.snapshot(COMMIT)) == home.path


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("models--microsoft--phi-4/snapshots/main", "microsoft/phi-4"),
        ("models--microsoft--phi-4", "models--microsoft--phi-4"),
        ("phi-4/snapshots/main", "main"),
        ("models--phi-4/snapshots/main", "main"),
        ("models--a--[b](c)/snapshots/main", "main"),
        ("mine/phi-4", "phi-4"),
    ],
)
def test_what_a_folder_tells_of_its_name(folder: str, name: str) -> None:
    assert layout.model_name(Path("/x") / folder) == name


def test_what_lies_in_a_cache(tmp_path: Path) -> None:
    for name in ("models--b--c", "models--a--b--c", "datasets--a--b", "models--gpt2", ".locks"):
        (tmp_path / name).mkdir()
    (tmp_path / "models--d--e").symlink_to("nowhere")
    (tmp_path / "version.txt").touch()
    assert [home.name for home in layout.model_folders(tmp_path)] == ["a/b--c", "b/c"]
    assert layout.model_folders(tmp_path / "none") == []


def test_contents_are_counted_once(tmp_path: Path) -> None:
    home = RepositoryFolder(tmp_path, "a/b")
    assert list(home.contents()) == []
    assert home.list_snapshots() == []
    for commit in ("old", "new"):
        home.snapshot(commit).mkdir(parents=True)
    (home.snapshots / "dangling").symlink_to("nowhere")
    home.blobs.mkdir()
    home.blob("a" * 40).write_bytes(b"123")
    home.blob("b" * 40).symlink_to("nowhere")
    home.blob("c" * 40).symlink_to(home.blob("a" * 40))  # as into a store of all repositories
    (home.snapshot("old") / "x").symlink_to(home.blob("a" * 40))
    (home.snapshot("new") / "y").write_bytes(b"12345")
    for number, commit in enumerate(("old", "new")):
        os.utime(home.snapshot(commit), (number, number))
    assert sorted(stat.st_size for stat in home.contents()) == [3, 3, 5]
    assert home.list_snapshots() == [home.snapshot("old"), home.snapshot("new")]


def test_what_a_branch_was(tmp_path: Path) -> None:
    home = RepositoryFolder(tmp_path, "a/b")
    assert home.noted_commit("main") is None
    home.ref("pr/1").parent.mkdir(parents=True)
    home.ref("pr/1").write_text(f"{COMMIT}\n")
    assert home.noted_commit("pr/1") == COMMIT
    assert home.noted_commit("pr") is None
    assert home.noted_commit("pr/1/2") is None


def test_one_module_alone_spells_the_folders() -> None:
    """Every other one asks it."""
    home = Path(layout.__file__).parents[2]
    spelled = ("models--", "datasets--", '"snapshots"', '/ "blobs"', "HF_HUB_CACHE")
    found = {
        path.relative_to(home).as_posix()
        for top in ("phimlx", "convert")
        for path in (home / top).rglob("*.py")
        if any(each in path.read_text(encoding="utf-8") for each in spelled)
    }
    assert found == {"phimlx/hub/layout.py"}
