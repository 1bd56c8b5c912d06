"""How a model comes here from a Hub on this machine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from huggingface_hub import constants

from phimlx.errors import PhimlxError
from phimlx.hub import download, resolve, transfer
from phimlx.hub.cache import find_snapshot
from phimlx.hub.client import Remote
from phimlx.hub.transfer import DownloadPlan, ProgressCallback
from tests.hub.cached import ORIGINAL, QUANTIZED, keep, use_empty_cache
from tests.hub.loopback_hub import COMMIT, Hub, serve_alone


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return use_empty_cache(tmp_path, monkeypatch)


@pytest.fixture
def server(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serve_alone(monkeypatch, cache) as running:
        yield running


FILES = {
    "config.json": b'{"a": 1}',
    "tokenizer.json": b'{"a": 2}',
    "tokenizer_config.json": b'{"a": 3}',
    "chat_template.jinja": b"x",
    "merges.txt": b"a b",
    "model-00001-of-00002.safetensors": b"weights 1",
    "model-00002-of-00002.safetensors": b"weights 2",
    "model.safetensors.index.json": json.dumps(
        {
            "weight_map": {
                "a": "model-00001-of-00002.safetensors",
                "b": "model-00002-of-00002.safetensors",
            }
        }
    ).encode(),
    "LICENSE": b"MIT",
}
UNWANTED = {
    "README.md": b"x",
    "modeling_phi3.py": b"import os",
    "pytorch_model.bin": b"pickle",
    "training_args.bin": b"pickle",
    "consolidated.safetensors": b"twice",
    "speech-lora/adapter_config.json": b"{}",
    "speech-lora/adapter_model.safetensors": b"x",
    "onnx/model.safetensors": b"x",
}


@pytest.mark.parametrize(
    ("source", "repo"),
    [("phi-4-mini", QUANTIZED), (ORIGINAL.lower(), ORIGINAL), ("someone/tune", "someone/tune")],
)
def test_download_brings_what_is_needed_and_resolve_finds_it(
    server: Hub, cache: Path, source: str, repo: str
) -> None:
    server.repos[repo] = {**FILES, **UNWANTED}
    done = download.download(source)
    folder = done.folder
    assert folder == cache / f"models--{repo.replace('/', '--')}" / "snapshots" / COMMIT
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == FILES
    # Once more: folders of adapters raise the question which layout this is.
    assert sorted(server.requested) == sorted([*FILES, "config.json"])
    assert resolve.resolve(source) == folder
    size = sum(map(len, FILES.values()))
    assert (done.repository, done.commit, done.files, done.nbytes) == (
        repo,
        COMMIT,
        len(FILES),
        size,
    )


def test_the_original_of_an_alias(server: Hub, cache: Path) -> None:
    server.repos[ORIGINAL] = dict(FILES)
    folder = download.download("phi-4-mini", original=True).folder
    assert resolve.resolve("phi-4-mini", original=True) == folder


def test_weights_come_last(server: Hub) -> None:
    server.repos[QUANTIZED] = dict(sorted(FILES.items(), reverse=True))
    download.download("phi-4-mini")
    assert server.requested[-2:] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]


def test_what_is_here_is_not_fetched_again(server: Hub) -> None:
    server.repos[QUANTIZED] = dict(FILES)
    folder = download.download("phi-4-mini").folder
    (folder / "LICENSE").unlink()
    server.requested.clear()
    download.download("phi-4-mini")
    assert (folder / "LICENSE").is_file()
    assert server.requested == []


def test_a_revision_is_found_afterwards(server: Hub, cache: Path) -> None:
    server.repos["someone/tune"] = dict(FILES)
    folder = download.download("someone/tune", "v1").folder
    assert resolve.resolve("someone/tune") == folder
    assert (cache / "models--someone--tune" / "refs" / "v1").read_text() == COMMIT
    assert find_snapshot("someone/tune", "v1") == folder
    assert find_snapshot("someone/tune", COMMIT) == folder
    assert find_snapshot("someone/tune", "main") is None


def test_nano_is_here_already(server: Hub) -> None:
    done = download.download("nano")
    assert (done.folder, done.repository, done.commit) == (resolve.NANO, None, None)
    assert server.requested == []


def test_the_watch_sees_the_plan_before_anything_is_fetched(server: Hub) -> None:
    server.repos["someone/tune"] = dict(FILES)

    @contextmanager
    def refuse(plan: DownloadPlan) -> Iterator[ProgressCallback]:
        assert plan.remaining == plan.nbytes == sum(map(len, FILES.values()))
        raise KeyboardInterrupt
        yield

    with pytest.raises(KeyboardInterrupt):
        download.download("someone/tune", show_progress=refuse)
    assert server.requested == []


# Offline


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.mark.usefixtures("offline")
def test_offline_the_store_answers(cache: Path, tmp_path: Path) -> None:
    folder = keep(cache, QUANTIZED)
    done = download.download("phi-4-mini")
    assert (done.folder, done.repository, done.commit) == (folder, QUANTIZED, COMMIT)
    assert (done.files, done.nbytes) == (3, 5)
    assert download.download("phi-4-mini", COMMIT).folder == folder
    assert download.download("phi-4-mini", local_dir=folder).folder == folder


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(("revision", "what"), [(None, QUANTIZED), ("v1", f"{QUANTIZED} at v1")])
def test_offline_half_a_model_is_an_error(cache: Path, revision: str | None, what: str) -> None:
    keep(cache, QUANTIZED, **{"model.safetensors": ""})
    error = downloading("phi-4-mini", revision)
    assert str(error) == f"{what} is not complete on this machine, and HF_HUB_OFFLINE is set."
    assert error.hint == "Unset HF_HUB_OFFLINE, then run it again."


def downloading(source: str, revision: str | None = None) -> PhimlxError:
    with pytest.raises(PhimlxError) as caught:
        download.download(source, revision, remote=Remote(wait=lambda seconds: None))
    return caught.value


@pytest.mark.parametrize(
    ("refusal", "message", "hint"),
    [
        (
            None,
            "The Hub has no model someone/tune, or it is private.",
            "Check the name; for a private one log in first with: hf auth login",
        ),
        (
            (401, {"X-Error-Code": "RepoNotFound"}),
            "The Hub has no model someone/tune, or it is private.",
            "Check the name; for a private one log in first with: hf auth login",
        ),
        (
            (403, {"X-Error-Code": "GatedRepo"}),
            "someone/tune is only for those who have accepted its terms.",
            "Accept them at {url}/someone/tune, then log in with: hf auth login",
        ),
        (
            (401, {"X-Error-Message": "Invalid credentials in Authorization header"}),
            "The Hub refuses this access to someone/tune (401).",
            "Log in again with: hf auth login, or correct or unset HF_TOKEN.",
        ),
        (
            (403, {}),
            "The Hub refuses this access to someone/tune (403).",
            "Log in again with: hf auth login, or correct or unset HF_TOKEN.",
        ),
        (
            (429, {"Retry-After": "3600"}),
            "The Hub has had too many requests from here.",
            "Try again in 3,600 s; logging in with: hf auth login raises the limit.",
        ),
        (
            (418, {}),
            "The Hub answers with an error (418) for someone/tune.",
            "Try again in a few minutes; what has come stays.",
        ),
    ],
)
def test_refusals_of_the_hub(
    server: Hub, refusal: tuple[int, dict[str, str]] | None, message: str, hint: str
) -> None:
    if refusal is not None:
        server.refusals["someone/tune"] = refusal
    error = downloading("someone/tune")
    assert str(error) == message
    assert error.hint == hint.format(url=server.url)


def test_a_revision_that_is_not_there(server: Hub) -> None:
    server.repos["someone/tune"] = dict(FILES)
    error = downloading("someone/tune", "v2")
    assert str(error) == "someone/tune has no revision v2."
    assert error.hint == "Leave --revision out to get the newest."


def test_a_repository_without_safetensors(server: Hub) -> None:
    server.repos["someone/tune"] = {"config.json": b"{}", "pytorch_model.bin": b"pickle"}
    error = downloading("someone/tune")
    assert str(error) == (
        "someone/tune holds no model*.safetensors, the only weights that phimlx reads."
    )
    assert server.requested == []


def test_a_disk_too_small(server: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.repos["someone/tune"] = {**FILES, "model-3.safetensors": bytes(5_000_000)}
    monkeypatch.setattr(transfer, "free_space", lambda folder: 1_200_000)
    error = downloading("someone/tune")
    assert str(error) == (
        "someone/tune needs 5.25 MB of disk space (5.00 MB to come and 5% to spare), but "
        f"{cache} has 1.20 MB."
    )
    assert error.hint == "Free some space, or set HF_HOME to a folder on a larger disk."
    assert server.requested == []


def test_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    error = downloading("phi-4-mini")
    assert str(error) == "The Hub cannot be reached at http://127.0.0.1:1."
    assert error.hint == "Check the network, then run it again; what has come stays."


def test_a_cache_that_cannot_be_written(server: Hub, cache: Path) -> None:
    server.repos[QUANTIZED] = dict(FILES)
    cache.write_text("a file where a folder should be")
    error = downloading("phi-4-mini")
    assert str(error).startswith(f"{cache}/.locks/models--mlx-community--Phi-4-mini-instruct-4bit")
    assert str(error).endswith(" cannot be used: not a directory.")
    assert error.hint == "Make it yours to read and write, or set HF_HOME to another folder."


@pytest.mark.parametrize("revision", ["../../x", "/etc", "a//b", "a b", "", "refs/../x", "-\n"])
def test_what_is_no_revision(server: Hub, revision: str) -> None:
    error = downloading("phi-4-mini", revision)
    assert str(error) == f"{revision!r} is no revision: a branch, a tag or a commit."
    assert error.hint == "Leave --revision out to get the newest."


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("./phi-4", "./phi-4 is a path; a download needs an alias or a Hub id."),
        ("llama", "llama is neither a folder, an alias nor a Hub id."),
    ],
)
def test_names_that_cannot_be_downloaded(source: str, message: str) -> None:
    assert str(downloading(source)) == message
