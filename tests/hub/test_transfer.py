"""Files from a Hub on this machine to this disk, through every fault that it can have."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants, scan_cache_dir, snapshot_download, try_to_load_from_cache

from phimlx.errors import DownloadError
from phimlx.hub import download, transfer
from phimlx.hub.cache import find_snapshot, verify
from phimlx.hub.client import BACKOFF, Remote, RemoteFile
from phimlx.hub.destination import CacheDestination, FolderDestination
from tests.hub.loopback_hub import COMMIT, Fault, Hub, serve_alone
from tests.locked_out import locked_out, open_folder
from tests.witness import FILES, REPO, SHA256, WEIGHTS, Witness, contents


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "hub"


@pytest.fixture
def server(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serve_alone(monkeypatch, cache) as running:
        running.repos[REPO] = dict(FILES)
        yield running


@pytest.fixture
def witness(server: Hub, cache: Path) -> Witness:
    return Witness()


def blobs(cache: Path) -> set[str]:
    return {path.name for path in cache.glob("models--someone--tune/blobs/*")}


# What comes, and where it goes


def test_the_layout_is_the_one_that_other_tools_read(witness: Witness, cache: Path) -> None:
    folder = witness.get()
    assert contents(folder) == FILES
    assert witness.counted == sum(map(len, FILES.values()))
    assert snapshot_download(REPO, local_files_only=True) == str(folder)
    found = try_to_load_from_cache(REPO, "model.safetensors")
    assert found == str(folder / "model.safetensors")
    (repo,) = scan_cache_dir(cache).repos
    (revision,) = repo.revisions
    assert (repo.repo_id, revision.commit_hash, set(revision.refs)) == (REPO, COMMIT, {"main"})
    assert revision.size_on_disk == sum(map(len, FILES.values()))
    assert os.readlink(folder / "model.safetensors") == f"../../blobs/{SHA256}"


def test_what_huggingface_hub_brought_is_not_brought_again(
    witness: Witness, server: Hub, cache: Path
) -> None:
    snapshot_download(REPO)
    server.requested.clear()
    assert contents(witness.get()) == FILES
    assert server.requested == []


def test_a_folder_of_ones_own_gets_plain_files(witness: Witness, tmp_path: Path) -> None:
    folder = witness.get(local_dir=tmp_path / "mine")
    assert folder == tmp_path / "mine"
    assert contents(folder) == FILES
    assert not any(path.is_symlink() for path in folder.rglob("*"))
    record = json.loads((folder / ".cache/phimlx/download.json").read_text())
    assert (record["repository"], record["revision"], record["commit"]) == (REPO, "main", COMMIT)
    assert record["files"]["model.safetensors"] == {"size": len(WEIGHTS), "hash": SHA256}


def test_a_folder_of_ones_own_takes_what_the_cache_has(
    witness: Witness, server: Hub, tmp_path: Path, cache: Path
) -> None:
    snapshot = witness.get()
    server.requested.clear()
    plan = download.plan_download(Remote().repository(REPO), Remote(), tmp_path / "mine")
    assert (plan.copied, plan.remaining) == (plan.nbytes, plan.nbytes)
    folder = witness.get(local_dir=tmp_path / "mine")
    assert contents(folder) == FILES
    assert server.requested == []
    assert witness.counted == sum(map(len, FILES.values()))
    (folder / "model.safetensors").write_bytes(b"changed")
    assert (snapshot / "model.safetensors").read_bytes() == WEIGHTS


def test_a_folder_of_ones_own_goes_on_from_half_a_copy(
    witness: Witness, server: Hub, tmp_path: Path, cache: Path
) -> None:
    witness.get()
    server.requested.clear()
    partial = tmp_path / "mine" / ".cache" / "phimlx" / f"{SHA256}.phimlx.incomplete"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(WEIGHTS[:1000])
    assert contents(witness.get(local_dir=tmp_path / "mine")) == FILES
    assert server.requested == []
    assert not partial.exists()


def test_what_the_cache_has_damaged_is_fetched(
    witness: Witness, server: Hub, tmp_path: Path, cache: Path
) -> None:
    (witness.get() / "model.safetensors").write_bytes(bytes(len(WEIGHTS)))
    server.requested.clear()
    assert contents(witness.get(local_dir=tmp_path / "mine")) == FILES
    assert server.requested == ["model.safetensors"]
    assert witness.counted == sum(map(len, FILES.values()))


def test_the_token_goes_to_the_hub_and_to_no_other_host(witness: Witness, server: Hub) -> None:
    witness.get()
    sent = server.authorizations
    assert sent[f"hub/{REPO}/resolve/{COMMIT}/model.safetensors"] == "Bearer hf_secret"
    assert sent[f"cdn/{REPO}/at/model.safetensors"] is None


def test_a_token_of_ones_own_is_sent_instead(server: Hub, cache: Path) -> None:
    Remote(token="hf_mine").repository(REPO)
    assert server.authorizations[f"hub/api/models/{REPO}"] == "Bearer hf_mine"


def test_a_renamed_repository_stays_under_the_name_asked_for(
    witness: Witness, server: Hub, cache: Path
) -> None:
    server.moved["someone/old"] = REPO
    folder = witness.get("someone/old")
    assert folder == cache / "models--someone--old" / "snapshots" / COMMIT
    assert contents(folder) == FILES
    repository = Remote().repository("someone/old")
    assert (repository.is_renamed, repository.current_name) == (True, REPO)


# Interruptions


@pytest.mark.parametrize("sixteenths", range(17))
def test_a_cut_at_every_fraction_goes_on_from_there(
    witness: Witness, server: Hub, sixteenths: int
) -> None:
    cut = len(WEIGHTS) * sixteenths // 16
    server.faults["model.safetensors"] = [Fault(cut=cut)]
    assert contents(witness.get()) == FILES
    assert server.served["model.safetensors"] == len(WEIGHTS)
    whole = sixteenths == 16
    assert server.ranges["model.safetensors"] == ([0] if whole else [0, cut])
    assert witness.waits == ([] if whole else [1])
    assert witness.counted == sum(map(len, FILES.values()))


def test_cuts_without_end_are_no_failure_while_something_comes(
    witness: Witness, server: Hub
) -> None:
    server.faults["model.safetensors"] = [Fault(cut=10_000) for _ in range(29)]
    assert contents(witness.get()) == FILES
    assert server.served["model.safetensors"] == len(WEIGHTS)
    assert witness.waits == [1] * 29


def test_where_nothing_comes_it_gives_up_and_the_next_run_goes_on(
    witness: Witness, server: Hub, cache: Path
) -> None:
    faults = [Fault(cut=100_000), *(Fault(cut=0) for _ in BACKOFF)]
    server.faults["model.safetensors"] = faults
    error = witness.fails()
    assert str(error) == f"The Hub cannot be reached at {server.url}."
    assert error.hint == "Check the network, then run it again; what has come stays."
    assert witness.waits == list(BACKOFF)
    assert find_snapshot(REPO) is None
    assert contents(witness.get()) == FILES
    assert server.served["model.safetensors"] == len(WEIGHTS)
    assert witness.counted == sum(map(len, FILES.values()))


def test_a_server_that_ignores_ranges_and_cuts_is_given_up(witness: Witness, server: Hub) -> None:
    cuts = [50_000, 100_000] * 10
    server.faults["model.safetensors"] = [Fault(cut=cut, whole=True) for cut in cuts]
    assert str(witness.fails()) == f"The Hub cannot be reached at {server.url}."
    assert len(server.ranges["model.safetensors"]) <= 2 + len(BACKOFF)


def test_an_interrupt_leaves_what_has_come(witness: Witness, server: Hub, cache: Path) -> None:
    remote = Remote(wait=witness.waits.append)
    plan = download.plan_download(remote.repository(REPO), remote)

    def interrupt(file: object, nbytes: int) -> None:
        witness.counted += nbytes
        if witness.counted > 100_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        plan.run(remote, interrupt)
    partial = cache / "models--someone--tune" / "blobs" / (SHA256 + ".phimlx.incomplete")
    held = partial.stat().st_size
    assert 0 < held < len(WEIGHTS)
    assert partial.read_bytes() == WEIGHTS[:held]
    assert plan.remaining == len(WEIGHTS) - held
    assert contents(witness.get()) == FILES
    assert server.ranges["model.safetensors"] == [0, held]
    assert not partial.exists()


CHILD = """
import sys
from phimlx.hub import download, transfer
from phimlx.hub.client import Remote

def report(file, nbytes):
    print(file.name, nbytes, flush=True)

remote = Remote()
plan = download.plan_download(remote.repository(sys.argv[1]), remote)
plan.run(remote, report)
print("done", flush=True)
"""


def start(server: Hub, cache: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, REPO],
        env={**os.environ, "HF_ENDPOINT": server.url, "HF_HUB_CACHE": str(cache)},
        stdout=subprocess.PIPE,
        text=True,
    )


def test_after_sigkill_only_the_rest_is_fetched(witness: Witness, server: Hub, cache: Path) -> None:
    server.faults["model.safetensors"] = [Fault(hold=123_456)]
    child = start(server, cache)
    assert child.stdout is not None
    seen = 0
    while seen < 123_456:
        name, nbytes = child.stdout.readline().split()
        seen += int(nbytes) if name == "model.safetensors" else 0
    child.send_signal(signal.SIGKILL)
    child.communicate(timeout=60)
    server.release.set()
    assert find_snapshot(REPO) is None
    assert contents(witness.get()) == FILES
    assert server.ranges["model.safetensors"] == [0, 123_456]
    assert server.served["model.safetensors"] == len(WEIGHTS)


def test_two_at_once_fetch_every_byte_once(witness: Witness, server: Hub, cache: Path) -> None:
    server.faults["model.safetensors"] = [Fault(hold=1000)]
    first = start(server, cache)
    assert first.stdout is not None
    while not first.stdout.readline().startswith("model.safetensors"):
        pass
    # The first holds the file and waits for the server; it goes on when the second waits for it.
    server.faults["model.safetensors"] = []
    remote = Remote(wait=witness.waits.append, log=lambda text: told(text))

    def told(text: str) -> None:
        witness.said.append(text)
        server.release.set()

    folder = download.plan_download(remote.repository(REPO), remote).run(remote)
    out, _ = first.communicate(timeout=60)
    assert out.endswith("done\n")
    assert witness.said == [transfer.WAITING]
    assert contents(folder) == FILES
    assert server.served["model.safetensors"] == len(WEIGHTS)


def test_a_partial_file_of_another_version_is_not_gone_on_with(
    witness: Witness, server: Hub, cache: Path
) -> None:
    server.faults["model.safetensors"] = [Fault(cut=100_000), *(Fault(cut=0) for _ in BACKOFF)]
    witness.fails()
    changed = WEIGHTS[::-1]
    server.repos[REPO]["model.safetensors"] = changed
    assert contents(witness.get())["model.safetensors"] == changed
    assert server.ranges["model.safetensors"][-1] == 0


@pytest.mark.parametrize(
    ("faults", "ranges", "served"),
    [
        ([Fault(cut=100_000), Fault(whole=True)], [0, 100_000], 400_000),
        ([Fault(cut=100_000), Fault(elsewhere=7)], [0, 100_000, 0], 400_000 + 200_000),
        ([Fault(cut=100_000, wrong=True)], [0, 100_000, 0], 600_000),
    ],
    ids=["the range is ignored", "another range comes", "the first part was wrong"],
)
def test_ranges_that_do_not_fit(
    witness: Witness, server: Hub, faults: list[Fault], ranges: list[int], served: int
) -> None:
    server.faults["model.safetensors"] = faults
    assert contents(witness.get()) == FILES
    assert server.ranges["model.safetensors"] == ranges
    assert server.served["model.safetensors"] <= served
    assert witness.counted == sum(map(len, FILES.values()))


@pytest.mark.parametrize("held", [b"x" * 5, WEIGHTS + b"x", b"y" * len(WEIGHTS)])
def test_a_partial_file_that_holds_something_else(
    witness: Witness, server: Hub, cache: Path, held: bytes
) -> None:
    partial = cache / "models--someone--tune" / "blobs" / (SHA256 + ".phimlx.incomplete")
    partial.parent.mkdir(parents=True)
    partial.write_bytes(held)
    assert contents(witness.get()) == FILES
    assert witness.counted == sum(map(len, FILES.values()))


# Contents


@pytest.mark.parametrize("name", FILES)
def test_wrong_bytes_of_the_right_size_are_fetched_once_more(
    witness: Witness, server: Hub, name: str
) -> None:
    server.faults[name] = [Fault(wrong=True)]
    assert contents(witness.get()) == FILES
    assert server.requested.count(name) == 2
    assert witness.counted == sum(map(len, FILES.values()))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("fault", [Fault(wrong=True), Fault(longer=1)], ids=["wrong", "longer"])
def test_what_is_wrong_twice_is_dropped(
    witness: Witness, server: Hub, cache: Path, name: str, fault: Fault
) -> None:
    server.faults[name] = [fault, fault]
    error = witness.fails()
    assert str(error) == (
        f"{name} of {REPO} came twice with contents that are not what the Hub says they are; "
        "they are deleted."
    )
    assert error.hint == (
        "Try again later, or from another network: something on the way changes them."
    )
    assert server.requested.count(name) == 2
    assert not any(blob.endswith(".incomplete") for blob in blobs(cache))
    assert find_snapshot(REPO) is None


def test_an_answer_that_ends_early_and_says_so(witness: Witness, server: Hub) -> None:
    server.faults["model.safetensors"] = [Fault(longer=-1000)]
    assert contents(witness.get()) == FILES
    assert server.ranges["model.safetensors"] == [0, len(WEIGHTS) - 1000]


def test_a_file_that_always_ends_early(witness: Witness, server: Hub) -> None:
    entry = {"size": 300_001, "lfs": {"sha256": SHA256, "size": 300_001, "pointerSize": 130}}
    server.listed[REPO, "model.safetensors"] = entry
    error = witness.fails()
    assert str(error) == f"model.safetensors of {REPO} ends after 300,000 of 300,001 bytes."
    assert error.hint == "Run it again in a few minutes; what has come stays."


@pytest.mark.parametrize("damage", [b"", b"x" * 300_000])
def test_a_damaged_file_here_is_mended(
    witness: Witness, server: Hub, cache: Path, damage: bytes
) -> None:
    folder = witness.get()
    (cache / "models--someone--tune" / "blobs" / SHA256).write_bytes(damage)
    server.requested.clear()
    assert contents(witness.get()) == FILES
    assert server.requested == ["model.safetensors"]
    assert verify(folder) == (3, [])


def test_a_slow_trickle_comes_whole(witness: Witness, server: Hub) -> None:
    server.repos[REPO]["model.safetensors"] = WEIGHTS[:2000]
    server.faults["model.safetensors"] = [Fault(piece=10)]
    assert contents(witness.get())["model.safetensors"] == WEIGHTS[:2000]
    assert witness.waits == []


def test_a_server_that_falls_silent_is_asked_again(
    witness: Witness, server: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    server.faults["model.safetensors"] = [Fault(hold=1000)]
    assert contents(witness.get()) == FILES
    assert server.ranges["model.safetensors"] == [0, 1000]
    assert witness.said == ["The connection was lost; trying again in 1 s."]


# Links, and the disk


def test_a_link_in_place_of_a_partial_file_is_not_followed(
    witness: Witness, cache: Path, tmp_path: Path
) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    partial = cache / "models--someone--tune" / "blobs" / (SHA256 + ".phimlx.incomplete")
    partial.parent.mkdir(parents=True)
    partial.symlink_to(victim)
    assert str(witness.fails()).startswith(f"{partial} cannot be used: ")
    assert victim.read_bytes() == b"precious"


def test_a_link_in_a_folder_of_ones_own_is_replaced_not_followed(
    witness: Witness, tmp_path: Path
) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "model.safetensors").symlink_to(victim)
    assert contents(witness.get(local_dir=tmp_path / "mine")) == FILES
    assert victim.read_bytes() == b"precious"


@pytest.mark.parametrize("local", [False, True])
def test_the_space_is_checked_with_five_percent_to_spare(
    witness: Witness,
    server: Hub,
    cache: Path,
    tmp_path: Path,
    local: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server.repos[REPO] = {"model.safetensors": bytes(200_000)}
    remote = Remote()
    local_dir = tmp_path / "mine" if local else None
    plan = download.plan_download(remote.repository(REPO), remote, local_dir)
    monkeypatch.setattr(transfer, "free_space", lambda folder: 210_000)
    plan.check_space()
    monkeypatch.setattr(transfer, "free_space", lambda folder: 209_999)
    with pytest.raises(DownloadError) as caught:
        plan.check_space()
    place = tmp_path / "mine" if local else cache
    assert str(caught.value) == (
        f"{REPO} needs 210 kB of disk space (200 kB to come and 5% to spare), but {place} has "
        "210 kB."
    )
    choice = "choose with --local-dir" if local else "set HF_HOME to"
    assert caught.value.hint == f"Free some space, or {choice} a folder on a larger disk."


def test_what_is_here_needs_no_space(witness: Witness, monkeypatch: pytest.MonkeyPatch) -> None:
    witness.get()
    monkeypatch.setattr(transfer, "free_space", lambda folder: 0)
    plan = download.plan_download(Remote().repository(REPO), Remote())
    assert plan.remaining == 0
    plan.check_space()


@pytest.mark.parametrize(
    ("number", "message", "hint"),
    [
        (
            errno.ENOSPC,
            "The disk of {cache} is full.",
            "Free some space and run it again, or set HF_HOME to a folder on a larger disk.",
        ),
        (
            errno.EROFS,
            "{cache} cannot be used: read-only file system.",
            "Make it yours to read and write, or set HF_HOME to another folder.",
        ),
    ],
)
def test_a_disk_that_refuses(
    witness: Witness,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    message: str,
    hint: str,
) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(transfer._PartialFile, "append", refuse)
    error = witness.fails()
    assert str(error) == message.format(cache=cache)
    assert error.hint == hint


def test_destinations_name_their_places(witness: Witness, tmp_path: Path) -> None:
    repository = Remote().repository(REPO)
    file = repository.file("config.json")
    assert file is not None
    home = tmp_path / "models--someone--tune"
    cached = CacheDestination(tmp_path, repository)
    assert cached.content(file) == home / "blobs" / file.hash
    assert cached.lock(file) == tmp_path / ".locks" / home.name / f"{file.hash}.lock"
    plain = FolderDestination(tmp_path, repository)
    assert plain.content(file) == tmp_path / "config.json"
    assert repository.file("none") is None


def test_a_cache_that_cannot_be_read(
    server: Hub, witness: Witness, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_folder() as folder:
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
        home = witness.get().parents[1]
        plan = download.plan_download(Remote().repository(REPO), Remote())
        assert plan.remaining == 0
        for locked in (home / "blobs", home, folder):
            with locked_out(locked):
                for ask in (lambda: plan.remaining, plan.check_space, lambda: plan.run(Remote())):
                    with pytest.raises(DownloadError) as caught:
                        ask()
                    assert str(caught.value).endswith(" cannot be used: permission denied.")


def test_a_partial_file_that_cannot_be_read_leaves_no_descriptor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: object, chunk: bytes) -> None:
        raise OSError(5, "Input/output error")

    (tmp_path / "partial").write_bytes(b"123")
    monkeypatch.setattr(transfer._PartialFile, "_count", fail)
    before = os.listdir("/dev/fd")
    file = RemoteFile("x", 5, "0" * 40)
    with (
        pytest.raises(OSError, match="Input/output"),
        transfer._PartialFile(tmp_path / "partial", file, transfer.no_progress),
    ):
        pass
    assert os.listdir("/dev/fd") == before
