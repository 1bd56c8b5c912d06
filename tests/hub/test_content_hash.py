"""Hashes of contents: right whatever changes, and computed once."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from phimlx.errors import CacheError
from phimlx.hub import content_hash as module
from phimlx.hub.content_hash import Contents, content_hash


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(module, "cache_file", lambda: tmp_path / "cache" / "hashes.json")
    return tmp_path / "cache" / "hashes.json"


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that has not been touched for long."""
    path = tmp_path / "weights"
    path.write_bytes(bytes(5000))
    later(monkeypatch)
    return path


def later(monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time() + 10
    monkeypatch.setattr(time, "time", lambda: now)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Grows by one for each file that is read."""
    calls: list[object] = []
    real = hashlib.file_digest

    def digest(file: object, name: str) -> object:
        calls.append(file)
        return real(file, name)  # type: ignore[arg-type]

    monkeypatch.setattr(hashlib, "file_digest", digest)
    return calls


def flip(path: Path) -> None:
    """Change the middle, and keep the time of the last change as it was."""
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replace(path: Path) -> None:
    """Put another file of the same size and time in its place."""
    before = path.stat()
    new = path.with_name("new")
    new.write_bytes(bytes(4999) + b"x")
    os.utime(new, ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(new, path)


def test_a_file_is_read_once(file: Path, computed: list[object], cache: Path) -> None:
    for _ in range(3):
        assert content_hash(file) == sha256(file)
    assert len(computed) == 1
    link = file.with_name("link")
    link.symlink_to(file)
    assert content_hash(link) == sha256(file)
    assert len(computed) == 1
    cache.write_text("{")
    assert content_hash(file) == sha256(file)
    assert len(computed) == 2


@pytest.mark.parametrize("change", [flip, replace, lambda path: os.truncate(path, 4999)])
def test_every_change_shows(file: Path, change: Callable[[Path], None]) -> None:
    before = content_hash(file)
    change(file)
    assert content_hash(file) == sha256(file) != before


def test_what_was_just_written_is_read_again(
    tmp_path: Path, computed: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "new"
    path.write_bytes(b"1")
    assert content_hash(path) == content_hash(path) == sha256(path)
    assert len(computed) == 2
    later(monkeypatch)
    assert content_hash(path) == content_hash(path) == sha256(path)
    assert len(computed) == 3


def test_the_hub_tells_the_hash_of_large_files(tmp_path: Path, computed: list[object]) -> None:
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    for name in ("a" * 64, "b" * 40):
        (blobs / name).write_bytes(b"x")
        (tmp_path / name).symlink_to(blobs / name)
    assert content_hash(tmp_path / ("a" * 64)) == "a" * 64
    assert not computed
    assert content_hash(tmp_path / ("b" * 40)) == hashlib.sha256(b"x").hexdigest()


def test_a_cache_that_cannot_be_written_costs_time_only(
    file: Path, computed: list[object], cache: Path
) -> None:
    cache.parent.write_text("a file where a folder should be")
    assert content_hash(file) == content_hash(file) == sha256(file)
    assert len(computed) == 2


def test_old_hashes_are_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, computed: list[object]
) -> None:
    monkeypatch.setattr(module, "KEPT", 3)
    paths = [tmp_path / str(number) for number in range(5)]
    for path in paths:
        path.write_text(path.name)
    later(monkeypatch)
    for path in paths:
        content_hash(path)
    assert len(computed) == 5
    for path in reversed(paths):
        assert content_hash(path) == sha256(path)
    assert len(computed) == 7


def model_in(folder: Path) -> Path:
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "preprocessor_config.json"):
        (folder / name).write_text(name)
    (folder / "README.md").write_text("read me")
    (folder / "speech").mkdir()
    (folder / "speech" / "adapter.safetensors").write_text("more")
    return folder


CHANGES: dict[str, Callable[[Path], object]] = {
    "contents": lambda folder: (folder / "model.safetensors").write_text("other"),
    "same size": lambda folder: (folder / "config.json").write_text("CONFIG.JSON"),
    "name": lambda folder: (folder / "config.json").rename(folder / "other.json"),
    "more": lambda folder: (folder / "more.safetensors").write_text("more"),
    "below": lambda folder: (folder / "speech" / "adapter.safetensors").write_text("less"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_is_told_by_what_its_files_hold(tmp_path: Path, change: str) -> None:
    def contents(folder: Path) -> Contents:
        return Contents(folder, [folder / "speech" / "adapter.safetensors"])

    one, other = model_in(tmp_path / "one"), model_in(tmp_path / "other")
    (other / "README.md").write_text("another")
    assert contents(one).digest == contents(other).digest
    CHANGES[change](other)
    assert contents(one).digest != contents(other).digest


@pytest.mark.parametrize("change", ["contents", "same size", "below"])
def test_files_that_change_after_a_model_was_loaded(tmp_path: Path, change: str) -> None:
    folder = model_in(tmp_path / "one")
    contents = Contents(folder, [folder / "speech" / "adapter.safetensors"])
    CHANGES[change](folder)
    with pytest.raises(CacheError, match="have changed since it was loaded"):
        contents.digest  # noqa: B018 (it is computed)
