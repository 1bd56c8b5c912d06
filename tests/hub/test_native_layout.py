"""Phi-4-multimodal in transformers' own layout comes whole from a Hub: its adapters in folders."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from huggingface_hub import constants, snapshot_download

from convert import Quantization
from convert import convert as convert_model
from convert.streaming import stream_model
from phimlx.checkpoint.folder import Checkpoint
from phimlx.checkpoint.load import load_model
from phimlx.cli.group import cli
from phimlx.errors import DownloadError, PhimlxError
from phimlx.hub import download, model_files, transfer
from phimlx.hub.cache import find_model, find_snapshot, list_models, recorded_bytes, remove, verify
from phimlx.hub.client import Remote, RemoteFile
from phimlx.hub.preview import preview
from phimlx.hub.transfer import DownloadPlan, ProgressCallback
from tests.checkpoint.test_multimodal import save, write_native
from tests.convert.tiny import plan, write_index
from tests.hub.loopback_hub import COMMIT, Fault, Hub, serve_alone

REPO = "someone/sees-and-hears"
NATIVE = b'{"model_type": "phi4_multimodal"}'
PUBLISHED = b'{"model_type": "phi4mm"}'
BASE = {
    "LICENSE": b"MIT",
    "config.json": NATIVE,
    "model.safetensors": b"base",
    "tokenizer.json": b"{}",
}
SPEECH, VISION = (f"{name}-lora/adapter_model.safetensors" for name in ("speech", "vision"))
ADAPTERS = {
    "speech-lora/adapter_config.json": b'{"r": 10}',
    SPEECH: b"speech's",
    "vision-lora/adapter_config.json": b'{"r": 8}',
    VISION: b"vision's",
}
UNWANTED = {
    "speech-lora/README.md": b"x",
    "speech-lora/tokenizer.json": b"{}",
    "vision-lora/nested/adapter_model.safetensors": b"x",
    "other-lora/adapter_model.safetensors": b"x",
}
FILES = {**BASE, **ADAPTERS}


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 5)
    with serve_alone(monkeypatch, tmp_path / "hub") as running:
        running.repos[REPO] = {**FILES, **UNWANTED}
        yield running


def get(local_dir: Path | None = None) -> download.DownloadResult:
    return download.download(REPO, local_dir=local_dir, remote=Remote(wait=lambda seconds: None))


def contents(folder: Path) -> dict[str, bytes]:
    """Files by their names, except what lies in hidden folders of ours."""
    names = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*")}
    return {
        name: path.read_bytes()
        for name, path in names.items()
        if path.is_file() and not name.startswith(".cache/")
    }


# What comes


@pytest.mark.parametrize("local", [False, True])
def test_the_adapters_come_along(server: Hub, tmp_path: Path, local: bool) -> None:
    done = get(tmp_path / "mine" if local else None)
    assert contents(done.folder) == FILES
    assert (done.files, done.nbytes) == (len(FILES), sum(map(len, FILES.values())))
    assert sorted(server.requested) == sorted([*FILES, "config.json"])
    assert verify(done.folder) == (len(FILES), [])
    assert recorded_bytes(done.folder) == done.nbytes


def test_the_base_comes_last(server: Hub) -> None:
    get()
    assert server.requested[-3:] == [SPEECH, VISION, "model.safetensors"]


@pytest.mark.parametrize("config", [PUBLISHED, b"{ }", b'{"model_type": ["phi4_multimodal"]}'])
def test_folders_that_hold_the_adapters_again_stay_away(server: Hub, config: bytes) -> None:
    server.repos[REPO]["config.json"] = config
    assert contents(get().folder) == {**BASE, "config.json": config}
    assert sorted(server.requested) == sorted([*BASE, "config.json"])


def test_without_such_folders_nothing_more_is_asked(server: Hub) -> None:
    server.repos[REPO] = dict(BASE)
    remote = Remote()
    made = download.plan_download(remote.repository(REPO), remote)
    assert [file.name for file in made.files] == sorted(BASE, key=lambda name: (".s" in name, name))
    assert server.requested == []


def test_a_repository_without_a_config_has_no_adapters(server: Hub) -> None:
    del server.repos[REPO]["config.json"]
    remote = Remote()
    made = download.plan_download(remote.repository(REPO), remote)
    assert {file.name for file in made.files} == BASE.keys() - {"config.json"}


def test_the_adapters_alone_are_no_model(server: Hub) -> None:
    del server.repos[REPO]["model.safetensors"]
    assert str(failing()) == (
        f"{REPO} holds no model*.safetensors, the only weights that phimlx reads."
    )
    assert server.requested == []


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (b"", "is not JSON (line 1, column 1: Expecting value)."),
        (b"{", "is not JSON (line 1, column 2: "),
        (b"[]", "is not a JSON object."),
        (b"\xff", "is not UTF-8 text."),
        (b"[" * 100_000, "is nested too deeply."),
    ],
)
def test_a_config_that_is_none(server: Hub, config: bytes, reason: str) -> None:
    server.repos[REPO]["config.json"] = config
    error = failing()
    assert str(error).startswith(f"config.json of {REPO} {reason}")
    assert error.hint == "It may have been damaged on its way: try again, or choose another model."


def test_a_config_without_end_is_not_read(server: Hub) -> None:
    server.listed[REPO, "config.json"] = {"size": 30_000_000}
    assert str(failing()) == "config.json has 30.0 MB, more than any model needs."
    assert server.requested == []


def failing() -> PhimlxError:
    with pytest.raises(PhimlxError) as caught:
        get()
    return caught.value


def test_other_tools_find_them_too(server: Hub) -> None:
    folder = get().folder
    assert os.readlink(folder / VISION).startswith("../../../blobs/")
    assert snapshot_download(REPO, local_files_only=True) == str(folder)
    server.requested.clear()
    assert snapshot_download(REPO, allow_patterns=[*FILES]) == str(folder)
    assert server.requested == []


def test_what_huggingface_hub_brought_is_checked_too(server: Hub) -> None:
    server.repos[REPO][".gitattributes"] = b"*.safetensors filter=lfs"
    folder = Path(snapshot_download(REPO))
    server.requested.clear()
    assert get().folder == folder
    assert server.requested == ["config.json"]
    right, unrecorded = verify(folder)
    assert (right, unrecorded) == (len(FILES), [])
    (folder / VISION).resolve().write_bytes(b"VISION'S")
    with pytest.raises(DownloadError) as caught:
        verify(folder)
    assert str(caught.value) == f"{folder} is damaged: {VISION}."


def test_a_folder_of_ones_own_takes_them_from_the_cache(server: Hub, tmp_path: Path) -> None:
    get()
    server.requested.clear()
    assert contents(get(tmp_path / "mine").folder) == FILES
    assert server.requested == ["config.json"]


def test_adapters_with_the_same_contents(server: Hub, tmp_path: Path) -> None:
    server.repos[REPO] |= {VISION: b"same", SPEECH: b"same"}
    for local_dir in (None, tmp_path / "mine"):
        assert contents(get(local_dir).folder) == {**FILES, VISION: b"same", SPEECH: b"same"}


# Interrupted, offline, removed


@contextmanager
def until_the_base(plan: DownloadPlan) -> Iterator[ProgressCallback]:
    def report(file: RemoteFile, nbytes: int) -> None:
        if file.name == "model.safetensors":
            raise KeyboardInterrupt

    yield report


@pytest.mark.parametrize("local", [False, True])
def test_an_interrupt_before_the_base_leaves_no_model(
    server: Hub, tmp_path: Path, local: bool
) -> None:
    folder = tmp_path / "mine" if local else tmp_path / "hub" / "models--someone--sees-and-hears"
    folder = folder if local else folder / "snapshots" / COMMIT
    with pytest.raises(KeyboardInterrupt):
        download.download(REPO, local_dir=folder if local else None, show_progress=until_the_base)
    assert contents(folder) == {k: v for k, v in FILES.items() if k != "model.safetensors"}
    assert not model_files.is_whole(folder)
    assert find_snapshot(REPO) is None
    server.requested.clear()
    assert get(folder if local else None).folder == folder
    assert contents(folder) == FILES
    assert not {SPEECH, VISION} & {*server.requested}


CHILD = """
import sys
from contextlib import contextmanager
from phimlx.hub.download import download

@contextmanager
def watch(plan):
    yield lambda file, nbytes: print(file.name, nbytes, flush=True)

download(sys.argv[1], show_progress=watch)
"""


@pytest.mark.parametrize("stuck", [VISION, "model.safetensors"])
def test_after_sigkill_only_the_rest_is_fetched(server: Hub, tmp_path: Path, stuck: str) -> None:
    server.repos[REPO] |= {SPEECH: b"s" * 5000, VISION: b"v" * 5000, "model.safetensors": b"b" * 50}
    held = len(server.repos[REPO][stuck]) // 2
    server.faults[stuck] = [Fault(hold=held)]
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, REPO],
        env={**os.environ, "HF_ENDPOINT": server.url, "HF_HUB_CACHE": str(tmp_path / "hub")},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    seen = 0
    while seen < held:
        name, nbytes = child.stdout.readline().split()
        seen += int(nbytes) if name == stuck else 0
    child.send_signal(signal.SIGKILL)
    child.communicate(timeout=60)
    server.release.set()
    assert find_snapshot(REPO) is None
    (begun,) = list_models()
    assert (begun.repository, begun.snapshot) == (REPO, None)
    folder = get().folder
    expected = {name: server.repos[REPO][name] for name in FILES}
    assert contents(folder) == expected
    assert server.ranges[stuck] == [0, held]
    for name in (SPEECH, VISION, "model.safetensors"):
        assert server.served[name] == len(expected[name])


@pytest.mark.parametrize("local", [False, True])
def test_offline(server: Hub, tmp_path: Path, local: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    local_dir = tmp_path / "mine" if local else None
    done = get(local_dir)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    here = get(local_dir)
    assert (here.folder, here.files, here.nbytes) == (done.folder, done.files, done.nbytes)


def test_removing_takes_them_along(server: Hub, tmp_path: Path) -> None:
    get()
    found = find_model(REPO)
    assert found is not None
    assert found.nbytes == sum(map(len, FILES.values()))
    remove(found)
    assert contents(tmp_path / "hub") == {}


@pytest.mark.parametrize("local", [False, True])
def test_what_is_missing_or_damaged_is_mended(server: Hub, tmp_path: Path, local: bool) -> None:
    local_dir = tmp_path / "mine" if local else None
    folder = get(local_dir).folder
    (folder / SPEECH).resolve().unlink()
    (folder / VISION).resolve().write_bytes(b"VISION'S")
    server.requested.clear()
    get(local_dir)
    assert contents(folder) == FILES
    assert server.requested == ["config.json", SPEECH, VISION]


# The model itself


@pytest.fixture
def native(data: Path, tmp_path: Path) -> Path:
    """A model in this layout, its base in two files."""
    weights = dict(mx.load(str(data / "tiny" / "tiny-phi4mm-remote" / "model.safetensors")))
    folder = write_native(tmp_path / "native", weights)
    base = dict(mx.load(str(folder / "model.safetensors")))
    (folder / "model.safetensors").unlink()
    names, weight_map = list(base), {}
    for shard in range(2):
        file = f"model-{shard + 1:05d}-of-00002.safetensors"
        save(folder / file, {name: base[name] for name in names[shard::2]})
        weight_map.update(dict.fromkeys(names[shard::2], file))
    write_index(folder, weight_map)
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture
def published(server: Hub, native: Path) -> Hub:
    """A Hub with that model."""
    server.repos[REPO] = contents(native)
    return server


def logits(folder: Path) -> np.ndarray:
    return np.array(load_model(Checkpoint(folder))(mx.array([[1, 2, 3, 4, 5]])))


def test_what_came_computes_what_was_published(published: Hub, native: Path) -> None:
    folder = get().folder
    assert contents(folder) == contents(native)
    first, second = Checkpoint(folder), Checkpoint(native)
    assert first.config == second.config
    assert first.adapter_files.keys() == {"vision", "speech"}
    ones, others = first.weights(), second.weights()
    assert ones.keys() == others.keys()
    assert all(mx.array_equal(ones[name], others[name]) for name in ones)
    assert np.array_equal(logits(folder), logits(native))


def test_a_preview_has_the_headers_of_all(published: Hub, native: Path) -> None:
    with preview(REPO) as (folder, _):
        seen, here = Checkpoint(folder), Checkpoint(native)
        assert seen.config == here.config
        assert [file.name for file in seen.files] == [file.name for file in here.files]
        facts = [
            {
                name: (it.shape, it.dtype, it.reads(0, 1)[0].info.name)
                for name, it in each.tensors.items()
            }
            for each in (seen, here)
        ]
        sizes = [[file.stat().st_size for file in each.files] for each in (seen, here)]
    assert facts[0] == facts[1]
    assert sizes[0] == sizes[1]
    assert not folder.exists()


def test_show(published: Hub, native: Path) -> None:
    shown = [
        json.loads(CliRunner().invoke(cli, ["show", source, "--json"]).stdout)
        for source in (REPO, str(native))
    ]
    own = {"name", "path", "download", "repository", "quantizations", "recommended"}
    remote, local = ({k: v for k, v in each.items() if k not in own} for each in shown)
    assert remote == local
    assert shown[0]["download"] == f"phimlx download {REPO}"
    assert remote["file_bytes"] == sum(
        len(content)
        for name, content in published.repos[REPO].items()
        if name.endswith(".safetensors")
    )


FOUR = Quantization(32, 4)


def expected_of(tmp_path: Path) -> dict[str, bytes]:
    """What a conversion makes of the model after a download; the download goes again."""
    convert_model(get().folder, tmp_path / "expected" / "out", FOUR, parts=["adapters"])
    downloaded = find_model(REPO)
    assert downloaded is not None
    remove(downloaded)
    return contents(tmp_path / "expected" / "out")


def convert_from_hub(out: Path) -> dict[str, bytes]:
    with stream_model(REPO, out, Remote(wait=lambda seconds: None)) as model:
        plan(model.folder, out, FOUR, parts=["adapters"], files=model).run()
    return contents(out)


def test_files_of_the_same_name_are_converted_as_they_arrive(
    published: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = expected_of(tmp_path)
    coming = tmp_path / ".out.source" / "coming"
    seen: list[set[str]] = []
    fetch = transfer.fetch

    def watched(*arguments: object) -> None:
        fetch(*arguments)
        if coming.is_dir():
            seen.append({name for name in contents(coming) if name.endswith(".safetensors")})

    monkeypatch.setattr(transfer, "fetch", watched)
    assert convert_from_hub(tmp_path / "out") == expected
    assert "README.md" in expected
    shards = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    assert seen == [{name} for name in (*shards, SPEECH, VISION)]
    assert not (tmp_path / ".out.source").exists()


def test_an_adapter_that_does_not_come_is_taken_up_later(published: Hub, tmp_path: Path) -> None:
    expected = expected_of(tmp_path)
    # The first two answers of each file are its header.
    published.faults[VISION] = [Fault(), Fault(), Fault(cut=1000), *[Fault(status=503)] * 20]
    with pytest.raises(DownloadError):
        convert_from_hub(tmp_path / "out")
    published.faults.clear()
    published.ranges.clear()
    assert convert_from_hub(tmp_path / "out") == expected
    assert published.ranges[VISION] == [0, 8, 1000]


def test_the_commands(published: Hub, native: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ran = CliRunner().invoke(cli, ["convert", REPO, "--out", str(out), "-q"])
    assert ran.exit_code == 0, ran.output
    assert "each of its 4 weight files" in ran.stderr
    assert Checkpoint(out).config["model_type"] == "phi4mm"
    ran = CliRunner().invoke(cli, ["download", REPO, "--local-dir", str(tmp_path / "mine")])
    assert ran.exit_code == 0, ran.output
    assert contents(tmp_path / "mine") == contents(native)
    ran = CliRunner().invoke(cli, ["download", str(tmp_path / "mine")])
    assert f"{len(contents(native))} files have the contents that the Hub published." in ran.stdout
    assert ran.exit_code == 0
