"""A converted folder on its way to a Hub on this machine, through every fault that it can have."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from convert import Quantization
from convert import convert as convert_model
from phimlx.errors import CheckpointError, PhimlxError
from phimlx.hub.client import BACKOFF, Remote
from phimlx.hub.upload import Upload, check, published_files, upload
from tests.convert.tiny import write_model
from tests.hub.loopback_hub import Fault
from tests.hub.loopback_upload import ACCOUNT, Desk, serve_desk

REPO = "me/tiny"
PUBLISHED = {"README.md", "config.json", "model.safetensors", "tokenizer.json"}


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    with serve_desk(monkeypatch, tmp_path / "hub") as running:
        yield running


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    source = write_model(tmp_path / "source")
    (source / "tokenizer.json").write_text("{}")
    convert_model(source, tmp_path / "tiny", Quantization(32, 4))
    return tmp_path / "tiny"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def publish(folder: Path, waits: list[float] | None = None, **options: Any) -> Upload:
    remote = Remote(wait=([] if waits is None else waits).append)
    return upload(folder, check(REPO, remote, **options), "A message")


def failing(work: Callable[[], object]) -> PhimlxError:
    with pytest.raises(PhimlxError) as caught:
        work()
    return caught.value


# What goes


def test_a_new_repository_holds_the_model_and_nothing_else(desk: Desk, folder: Path) -> None:
    for name in (".journal.json", "report.json", "modeling.py", ".cache/phimlx/download.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("/home/somebody")
    done = publish(folder)
    assert desk.hub.repos[REPO] == {name: (folder / name).read_bytes() for name in PUBLISHED}
    assert REPO not in desk.hub.private
    assert done.repository == REPO
    assert done.url == f"{desk.hub.url}/{REPO}"
    assert done.commit == f"{1:040x}"
    assert set(done.files) == PUBLISHED
    assert done.nbytes == sum((folder / name).stat().st_size for name in PUBLISHED)
    assert [message for message, _ in desk.commits] == ["A message"]
    assert desk.tokens == {"Bearer hf_secret"}


def test_a_token_of_ones_own_is_sent_instead(desk: Desk, folder: Path) -> None:
    upload(folder, check(REPO, Remote(token="hf_mine")), "A message")
    assert desk.tokens == {"Bearer hf_mine"}


def test_a_private_repository(desk: Desk, folder: Path) -> None:
    publish(folder, private=True)
    assert REPO in desk.hub.private
    publish(folder, private=True)  # it may be published to again


def test_an_existing_repository_gets_the_model_and_loses_other_weights(
    desk: Desk, folder: Path
) -> None:
    kept = {"notes.md": b"mine", "adapter_model.safetensors": b"mine too"}
    old = {"model-00001-of-00002.safetensors": b"1", "model.safetensors.index.json": b"{}"}
    desk.hub.repos[REPO] = {**kept, **old, "model.safetensors": b"old"}
    publish(folder)
    expected = {name: (folder / name).read_bytes() for name in PUBLISHED}
    assert desk.hub.repos[REPO] == {**kept, **expected}
    assert "create" not in desk.asked
    ((_, changes),) = desk.commits
    assert {name for name, data in changes.items() if data is None} == set(old)


def test_what_is_there_is_not_sent_again(desk: Desk, folder: Path) -> None:
    publish(folder)
    desk.asked.clear()
    publish(folder)
    assert "put" not in desk.asked


def test_half_a_model_is_not_published(desk: Desk, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError):
        published_files(folder)
    with pytest.raises(CheckpointError):
        publish(folder)
    assert desk.commits == []
    assert REPO not in desk.hub.repos


# What is refused before any work


@pytest.mark.parametrize(
    "name",
    ["tiny", "", "a/b/c", "me/-x", "me/x.git", "me/a--b", "me/" + "x" * 97, "me/a b", "../x"],
)
def test_names_that_are_none(desk: Desk, name: str) -> None:
    error = failing(lambda: check(name, Remote()))
    assert str(error).endswith(" is no name for a repository, which has the form owner/name.")
    assert error.hint == "Letters, digits, -, _ and . may stand in a name, at most 96 of them."
    assert desk.asked == []


def test_offline(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    error = failing(lambda: check(REPO, Remote()))
    assert str(error) == "HF_HUB_OFFLINE is set, so nothing can be uploaded."
    assert error.hint == "Unset HF_HUB_OFFLINE."


def test_no_token(desk: Desk, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    error = failing(lambda: check(REPO, Remote()))
    assert str(error) == "An upload needs a token that may write, and there is none here."
    assert error.hint == (
        f"Make one at {desk.hub.url}/settings/tokens, then log in with: hf auth login"
    )


READING = {"type": "access_token", "accessToken": {"role": "read"}}


def test_a_token_that_may_not_write_makes_no_repository(desk: Desk) -> None:
    desk.account = {**ACCOUNT, "auth": READING}
    error = failing(lambda: check(REPO, Remote()))
    assert str(error) == "This token may not write to me/tiny."
    assert error.hint == (
        f"Make one that may at {desk.hub.url}/settings/tokens, then log in with: hf auth login"
    )
    assert desk.asked == ["whoami-v2"]


@pytest.mark.parametrize("auth", [{"type": "oauth"}, {"accessToken": {"role": "fineGrained"}}])
def test_of_other_tokens_the_hub_judges(desk: Desk, auth: dict[str, Any]) -> None:
    desk.account = {**ACCOUNT, "auth": auth}
    assert not check(REPO, Remote()).exists


def test_the_hub_judges_who_may_write_to_what_exists(desk: Desk) -> None:
    desk.hub.repos["microsoft/tiny"] = {}
    assert check("microsoft/tiny", Remote()).exists
    assert desk.asked == ["auth-check"]
    desk.faults["auth-check"] = [Fault(status=403)]
    error = failing(lambda: check("microsoft/tiny", Remote()))
    assert str(error) == "The Hub does not let this token write to microsoft/tiny (403)."
    assert error.hint == f"Check what the token may do at {desk.hub.url}/settings/tokens."


def test_whose_repository(desk: Desk) -> None:
    assert check("us/tiny", Remote()).name == "us/tiny"
    error = failing(lambda: check("microsoft/tiny", Remote()))
    assert str(error) == "microsoft is neither you, me, nor an organisation of yours."
    assert error.hint == "Upload to me/tiny, or log in as another with: hf auth login"
    error = failing(lambda: check("them/tiny", Remote()))
    assert str(error) == "In the organisation them you may only read."
    assert error.hint == "Ask its admin for more."


def test_a_public_repository_is_not_private(desk: Desk) -> None:
    desk.hub.repos[REPO] = {}
    error = failing(lambda: check(REPO, Remote(), private=True))
    assert str(error) == "me/tiny exists, and everybody can see it."
    assert error.hint == (
        f"Make it private at {desk.hub.url}/me/tiny/settings, or choose another name."
    )


def test_a_public_repository_that_appears_meanwhile(desk: Desk, folder: Path) -> None:
    target = check(REPO, Remote(), private=True)
    desk.hub.repos[REPO] = {}
    error = failing(lambda: upload(folder, target, "A message"))
    assert (
        str(error) == "me/tiny was to be private, but everybody can see it; nothing was uploaded."
    )
    assert error.hint == "Choose another name."
    assert desk.commits == []


def test_a_repository_that_appears_meanwhile_will_do(desk: Desk, folder: Path) -> None:
    target = check(REPO, Remote())
    desk.hub.repos[REPO] = {}
    upload(folder, target, "A message")
    assert set(desk.hub.repos[REPO]) == PUBLISHED


# Faults

STEPS = ("whoami-v2", "create", "preupload", "batch", "put", "commit")


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_hub_is_waited_for(desk: Desk, folder: Path, step: str, status: int) -> None:
    desk.faults[step] = [Fault(status=status)]
    publish(folder)
    assert set(desk.hub.repos[REPO]) == PUBLISHED
    assert len(desk.commits) == 1


@pytest.mark.parametrize("step", STEPS[1:])
def test_a_refusal_leaves_the_folder_whole_and_the_next_call_goes_on(
    desk: Desk, folder: Path, step: str
) -> None:
    before = contents(folder)
    desk.faults[step] = [Fault(status=403)]
    error = failing(lambda: publish(folder))
    assert str(error) == "The Hub does not let this token write to me/tiny (403)."
    assert error.hint == f"Check what the token may do at {desk.hub.url}/settings/tokens."
    assert contents(folder) == before
    assert desk.commits == []
    stored = len(desk.stored)
    desk.asked.clear()
    publish(folder)
    assert set(desk.hub.repos[REPO]) == PUBLISHED
    assert desk.asked.count("put") == 2 - stored


def test_a_token_that_the_hub_does_not_know(desk: Desk) -> None:
    desk.faults["whoami-v2"] = [Fault(status=401)]
    error = failing(lambda: check(REPO, Remote()))
    assert str(error) == "The Hub does not know this token (401)."
    assert error.hint == "Log in again with: hf auth login, or correct or unset HF_TOKEN."


def test_an_answer_that_is_not_the_hubs(desk: Desk) -> None:
    desk.account = ["log in first"]
    error = failing(lambda: check(REPO, Remote()))
    assert str(error) == f"What answers at {desk.hub.url} does not speak as the Hub does."
    assert error.hint == "Check HF_ENDPOINT, and whether a log-in page stands in between."


def test_a_rate_limit_that_is_too_long_to_wait_for(desk: Desk, folder: Path) -> None:
    desk.faults["commit"] = [Fault(status=429, headers={"Retry-After": "3600"})]
    error = failing(lambda: publish(folder))
    assert str(error) == "The Hub has had too many requests from here."
    assert error.hint == "Try again in 3,600 s."


def test_a_hub_that_stays_broken(desk: Desk, folder: Path) -> None:
    waits: list[float] = []
    desk.faults["commit"] = [Fault(status=500)] * 10
    error = failing(lambda: publish(folder, waits))
    assert str(error) == "The Hub answers with an error (500) for me/tiny."
    assert error.hint == "Try again in a few minutes."
    assert waits == list(BACKOFF)
    assert desk.asked.count("put") == 2  # tries after the first send nothing again


def test_a_connection_that_is_dropped_once(desk: Desk, folder: Path) -> None:
    desk.faults["put"] = [Fault(cut=1000)]
    publish(folder)
    assert desk.hub.repos[REPO]["model.safetensors"] == (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("step", ["put", "commit"])
def test_a_connection_that_is_always_dropped(desk: Desk, folder: Path, step: str) -> None:
    before = contents(folder)
    desk.faults[step] = [Fault(cut=0)] * 20
    error = failing(lambda: publish(folder))
    assert str(error) == f"The Hub cannot be reached at {desk.hub.url}."
    assert error.hint == "Check the network."
    assert contents(folder) == before


def test_what_the_transfer_raises_itself(
    desk: Desk, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: object, **keywords: object) -> None:
        raise RuntimeError("CAS said no")

    monkeypatch.setattr("huggingface_hub.HfApi.create_commit", broken)
    error = failing(lambda: publish(folder))
    assert str(error) == "The upload failed: 'CAS said no'."
