"""What is on this machine: found, measured, checked and removed, and nothing else touched."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from huggingface_hub import scan_cache_dir
from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

from phimlx.errors import DownloadError
from phimlx.hub import download
from phimlx.hub.cache import (
    CachedModel,
    find_model,
    find_snapshot,
    list_models,
    recorded_bytes,
    remove,
    verify,
)
from phimlx.hub.client import Remote
from phimlx.hub.destination import origin_of
from tests.hub.loopback_hub import Fault, Hub, serve_alone

ORIGIN = {"repository": "someone/tune", "commit": "0123456789" * 4}
REPO = "someone/tune"
QUANTIZED = "mlx-community/phi-4-4bit"
CONFIG = b'{"model_type": "phi3", "dtype": "bfloat16"}'
CONFIG_4BIT = b'{"model_type": "phi3", "quantization": {"bits": 4, "group_size": 64}}'
FILES = {"config.json": CONFIG, "tokenizer.json": b"{}", "model.safetensors": bytes(10_000)}
SIZE = sum(map(len, FILES.values()))


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serve_alone(monkeypatch, tmp_path / "hub") as running:
        running.repos[REPO] = dict(FILES)
        running.repos[QUANTIZED] = {**FILES, "config.json": CONFIG_4BIT}
        yield running


def get(repo: str, local_dir: Path | None = None) -> Path:
    remote = Remote(wait=lambda seconds: None)
    return download.download(repo, local_dir=local_dir, remote=remote).folder


def get_half(server: Hub, repo: str = REPO) -> None:
    server.faults["model.safetensors"] = [Fault(cut=4000), Fault(status=403)]
    with pytest.raises(DownloadError):
        get(repo)


def stored(repo: str = REPO) -> CachedModel:
    found = find_model(repo)
    assert found is not None
    return found


# What there is


def test_nothing_is_here(server: Hub) -> None:
    assert list_models() == []
    assert find_model(REPO) is None


def test_what_is_here(server: Hub) -> None:
    folder, quantized = get(REPO), get(QUANTIZED)
    for path in folder.iterdir():
        os.utime(path, (1_700_000_000, 1_600_000_000))
    first, second = list_models()
    assert (first.repository, first.alias, first.snapshot) == (QUANTIZED, "phi-4", quantized)
    assert (second.repository, second.alias, second.snapshot) == (REPO, None, folder)
    assert (first.bits, second.bits) == (4, 16)
    assert second.nbytes == SIZE
    assert second.last_used == datetime(2023, 11, 14, 22, 13, 20, tzinfo=UTC)


def test_half_a_model_counts_with_the_bytes_that_are_here(server: Hub) -> None:
    get_half(server)
    (half,) = list_models()
    assert (half.snapshot, half.bits) == (None, 16)
    assert half.nbytes == SIZE - 6000


def test_a_partial_file_alone_is_a_model_that_has_begun(server: Hub, tmp_path: Path) -> None:
    server.faults["config.json"] = [Fault(cut=5), Fault(status=403)]
    with pytest.raises(DownloadError):
        get(REPO)
    (begun,) = list_models()
    assert (begun.repository, begun.nbytes, begun.bits, begun.snapshot) == (REPO, 5, None, None)


@pytest.mark.parametrize("config", [b'{"model_type": "bert"}', b"[]", b"{", b'{"a": 1}'])
def test_other_families_are_left_out(server: Hub, config: bytes) -> None:
    server.repos[REPO] = {**FILES, "config.json": config}
    get(REPO)
    assert list_models() == []
    assert stored().bits is None


# Removing


def test_removing_takes_everything_of_it_and_nothing_else(server: Hub, tmp_path: Path) -> None:
    get(REPO)
    server.commit = "f" * 40
    server.repos[REPO] = {**FILES, "tokenizer.json": b'{"newer": 1}'}
    get(REPO)
    get_half(server, QUANTIZED)
    other = stored(QUANTIZED)
    remove(stored())
    assert sorted(path.name for path in (tmp_path / "hub").iterdir()) == [
        ".locks",
        "models--mlx-community--phi-4-4bit",
    ]
    assert [path.name for path in (tmp_path / "hub" / ".locks").iterdir()] == [other.home.path.name]
    assert stored(QUANTIZED) == other


def test_removing_half_a_model(server: Hub) -> None:
    get_half(server)
    remove(stored())
    assert find_model(REPO) is None


def test_a_model_that_is_coming_is_not_removed(server: Hub, tmp_path: Path) -> None:
    get_half(server)
    (lock, *_) = (tmp_path / "hub" / ".locks" / "models--someone--tune").iterdir()
    with WeakFileLock(lock), pytest.raises(DownloadError) as caught:
        remove(stored())
    assert str(caught.value) == f"{REPO} is being downloaded right now."
    assert caught.value.hint == "Wait for that download, or stop it, then run this again."
    assert stored().nbytes == SIZE - 6000


def test_a_link_is_not_followed(server: Hub, tmp_path: Path) -> None:
    get(REPO)
    home = tmp_path / "hub" / "models--someone--tune"
    home.rename(tmp_path / "elsewhere")
    home.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DownloadError) as caught:
        remove(stored())
    assert str(caught.value) == f"{home} is a link to another place, so it is left alone."
    assert find_snapshot(REPO) is not None


def test_contents_shared_by_huggingface_hub_go_when_nobody_else_needs_them(
    server: Hub, tmp_path: Path
) -> None:
    shared = pytest.importorskip("huggingface_hub.utils._shared_blobs")
    cache, digest = tmp_path / "hub", "a" * 64
    for repo in (REPO, QUANTIZED):
        blob = (
            get(repo).parents[1] / "blobs" / hashlib.sha256(FILES["model.safetensors"]).hexdigest()
        )
        arguments = {"blob_path": str(blob), "xet_hash": digest, "cache_dir": str(cache)}
        size = len(FILES["model.safetensors"])
        if not shared.try_link_from_shared_store(**arguments, expected_size=size):
            assert shared.publish_blob_to_shared_store(
                **arguments, expected_size=size, replace_existing=False
            )
        if not blob.is_symlink():
            blob.unlink()
            assert shared.try_link_from_shared_store(**arguments, expected_size=size)
        assert blob.is_symlink()
    payload = cache / "blobs" / "aa" / digest
    remove(stored(REPO))
    assert payload.exists()
    assert find_snapshot(QUANTIZED) is not None
    remove(stored(QUANTIZED))
    assert not payload.exists()
    assert not scan_cache_dir(cache).repos


# Checking a folder


@pytest.mark.parametrize("local", [False, True])
def test_a_folder_as_it_came(server: Hub, tmp_path: Path, local: bool) -> None:
    folder = get(REPO, tmp_path / "mine" if local else None)
    counted: list[int] = []
    assert verify(folder, lambda file, nbytes: counted.append(nbytes)) == (3, [])
    assert sum(counted) == recorded_bytes(folder) == SIZE
    (folder / "notes.txt").write_text("mine")
    assert verify(folder) == (3, ["notes.txt"])


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("content", [bytes(9_999) + b"x", b"short"])
def test_a_damaged_folder(server: Hub, tmp_path: Path, local: bool, content: bytes) -> None:
    folder = get(REPO, tmp_path / "mine" if local else None)
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(DownloadError) as caught:
        verify(folder)
    assert str(caught.value) == f"{folder} is damaged: model.safetensors."
    assert caught.value.hint == "Download it again; what is right stays as it is."
    get(REPO, tmp_path / "mine" if local else None)
    assert verify(folder) == (3, [])


@pytest.mark.parametrize("local", [False, True])
def test_a_folder_that_lacks_something(server: Hub, tmp_path: Path, local: bool) -> None:
    folder = get(REPO, tmp_path / "mine" if local else None)
    (folder / "model.safetensors").resolve().unlink()
    with pytest.raises(DownloadError) as caught:
        verify(folder)
    assert str(caught.value) == f"{folder} lacks model.safetensors."


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("{", " is not JSON (line 1, column 2: "),
        ("[]", " is not a JSON object."),
        (b"\xff", " is not UTF-8 text."),
        ("[" * 100_000, " is nested too deeply."),
        *(
            (json.dumps({**ORIGIN, **change}), " is damaged: it is no record of a download.")
            for change in (
                {"files": 3},
                {"files": {"config.json": 3}},
                {"files": {"config.json": {"size": "x", "hash": "y"}}},
                {"files": {"config.json": {"size": 2, "hash": "0" * 39}}},
                {"files": {"config.json": {"size": 2, "hash": 3}}},
                {"repository": "a/[b](c)"},
                {"repository": 3},
                {"commit": "main"},
                {"commit": None},
            )
        ),
        (json.dumps(ORIGIN), " is damaged: it is no record of a download."),
    ],
)
def test_a_damaged_record_is_said(tmp_path: Path, record: str | bytes, message: str) -> None:
    path = tmp_path / ".cache" / "phimlx" / "download.json"
    path.parent.mkdir(parents=True)
    path.write_bytes(record if isinstance(record, bytes) else record.encode())
    (tmp_path / "config.json").write_text("{}")
    for ask in (verify, recorded_bytes, origin_of):
        with pytest.raises(DownloadError) as caught:
            ask(tmp_path)
        assert str(caught.value).startswith(f"{path}{message}")
        assert caught.value.hint == "Download the model again; what is right stays as it is."


ADAPTER = "vision-lora/adapter_model.safetensors"


@pytest.fixture
def native(server: Hub) -> Hub:
    """The same with an adapter in a folder of its own."""
    config = b'{"model_type": "phi4_multimodal"}'
    server.repos[REPO] = {**FILES, "config.json": config, ADAPTER: bytes(500)}
    return server


@pytest.mark.parametrize("local", [False, True])
def test_an_adapter_is_checked_too(native: Hub, tmp_path: Path, local: bool) -> None:
    folder = get(REPO, tmp_path / "mine" if local else None)
    assert verify(folder) == (4, [])
    (folder / ADAPTER).resolve().write_bytes(bytes(499) + b"x")
    with pytest.raises(DownloadError) as caught:
        verify(folder)
    assert str(caught.value) == f"{folder} is damaged: {ADAPTER}."
    (folder / ADAPTER).resolve().unlink()
    with pytest.raises(DownloadError) as caught:
        verify(folder)
    assert str(caught.value) == f"{folder} lacks {ADAPTER}."


def test_what_else_lies_in_a_folder_of_ones_own(native: Hub, tmp_path: Path) -> None:
    folder = get(REPO, tmp_path / "mine")
    for name in ("speech-lora/adapter_config.json", "runs/step-1/adapter_model.safetensors"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text("{}")
    assert verify(folder) == (4, ["speech-lora/adapter_config.json"])


@pytest.mark.parametrize(
    "name",
    [
        "../secret",
        "../secret/",
        "vision-lora/../../secret",
        "vision-lora/../../../secret",
        "{folder}/secret",
        ".cache/../../secret",
    ],
)
def test_a_record_reaches_no_other_folder(tmp_path: Path, name: str) -> None:
    record = {**ORIGIN, "files": {name.format(folder=tmp_path): {"size": 1, "hash": "0" * 40}}}
    (tmp_path / "a" / "vision-lora").mkdir(parents=True)
    (tmp_path / "a" / ".cache" / "phimlx").mkdir(parents=True)
    (tmp_path / "a" / ".cache" / "phimlx" / "download.json").write_text(json.dumps(record))
    (tmp_path / "secret").write_text("x")
    assert verify(tmp_path / "a") == (0, [])
