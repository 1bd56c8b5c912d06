"""What a Hub may answer: that it is busy, that it refuses, names that no Hub should give."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from phimlx.hub.client import BACKOFF, retry_after
from tests.hub.loopback_hub import Fault, Hub, serve_alone
from tests.witness import FILES, REPO, Witness, contents


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


# A Hub that is busy, or refuses


@pytest.mark.parametrize(
    ("status", "headers", "waits"),
    [
        (429, {"Retry-After": "7"}, [7]),
        (429, {"RateLimit": '"api";r=0;t=55'}, [55]),
        (429, {}, [1]),
        (503, {"Retry-After": "3"}, [3]),
        (500, {}, [1]),
        (502, {}, [1]),
        (408, {}, [1]),
    ],
)
def test_a_busy_hub_is_waited_for(
    witness: Witness, server: Hub, status: int, headers: dict[str, str], waits: list[float]
) -> None:
    server.busy[REPO] = [(status, headers)]
    server.faults["model.safetensors"] = [Fault(status=status, headers=headers)]
    assert contents(witness.get()) == FILES
    assert witness.waits == waits * 2
    assert witness.said == [f"The Hub is busy; trying again in {waits[0]} s."] * 2


@pytest.mark.parametrize(
    ("status", "headers", "waits", "message", "hint"),
    [
        (
            429,
            {"Retry-After": "3600"},
            [],
            "The Hub has had too many requests from here.",
            "Try again in 3,600 s; logging in with: hf auth login raises the limit.",
        ),
        (
            429,
            {},
            list(BACKOFF),
            "The Hub has had too many requests from here.",
            "Try again in a few minutes; logging in with: hf auth login raises the limit.",
        ),
        (
            500,
            {},
            list(BACKOFF),
            f"The Hub answers with an error (500) for {REPO}.",
            "Try again in a few minutes; what has come stays.",
        ),
        (
            403,
            {"X-Error-Code": "GatedRepo"},
            [],
            f"{REPO} is only for those who have accepted its terms.",
            f"Accept them at {{url}}/{REPO}, then log in with: hf auth login",
        ),
        (
            401,
            {"X-Error-Message": "Invalid credentials in Authorization header"},
            [],
            f"The Hub refuses this access to {REPO} (401).",
            "Log in again with: hf auth login, or correct or unset HF_TOKEN.",
        ),
        (
            404,
            {"X-Error-Code": "EntryNotFound"},
            [],
            f"The Hub answers with an error (404) for {REPO}.",
            "Try again in a few minutes; what has come stays.",
        ),
    ],
)
def test_refusals_of_a_file(
    witness: Witness,
    server: Hub,
    status: int,
    headers: dict[str, str],
    waits: list[float],
    message: str,
    hint: str,
) -> None:
    server.faults["model.safetensors"] = [Fault(status=status, headers=headers)] * 10
    error = witness.fails()
    assert str(error) == message
    assert error.hint == hint.format(url=server.url)
    assert witness.waits == waits


def test_a_date_to_wait_for() -> None:
    assert retry_after({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0
    assert retry_after({"Retry-After": "soon"}) is None
    assert retry_after({}) is None
    assert retry_after({"RateLimit": '"api";r=3;t=55'}) is None


# Names and hashes that no Hub should give


@pytest.mark.parametrize(
    "name",
    [
        "../model.safetensors",
        "a/../../model.json",
        "/etc/model.json",
        "..\\model.json",
        "C:\\model.json",
        "model\0.json",
        "model\n.json",
        "a//b.json",
        "./model.json",
        "..",
        "",
        "a/",
    ],
)
def test_names_that_leave_the_folder_are_refused(
    witness: Witness, server: Hub, cache: Path, name: str
) -> None:
    server.repos[REPO][name] = b"x"
    error = witness.fails()
    assert str(error) == (
        f"{REPO} lists a file {name!r}, which would leave its folder; nothing of it is downloaded."
    )
    assert server.requested == []
    assert not cache.exists()


@pytest.mark.parametrize(
    "entry",
    [
        {"blobId": None},
        {"blobId": "../../../x"},
        {"blobId": "A" * 40},
        {"lfs": {"sha256": "../x", "size": 3, "pointerSize": 1}},
        {"size": -1},
    ],
)
def test_a_file_without_a_hash_is_refused(
    witness: Witness, server: Hub, entry: dict[str, object]
) -> None:
    server.listed[REPO, "config.json"] = entry
    error = witness.fails()
    assert str(error) == (
        f"{REPO} lists 'config.json' without a hash, so what comes could not be checked."
    )
    assert error.hint == "Unset HF_ENDPOINT to use the Hub itself."


def test_a_file_listed_twice_is_refused(witness: Witness, server: Hub) -> None:
    server.listed[REPO, "tokenizer.json"] = {"rfilename": "config.json"}
    assert str(witness.fails()) == f"{REPO} lists the file 'config.json' twice."


@pytest.mark.parametrize("commit", ["../../x", "main", "", "A" * 40])
def test_a_commit_that_is_none_is_refused(witness: Witness, server: Hub, commit: str) -> None:
    server.commit = commit
    assert str(witness.fails()) == f"{REPO} names {commit!r} as its commit, which is none."


@pytest.mark.parametrize(
    "answer", [{"id": REPO, "siblings": [{}]}, {}, {"id": REPO, "siblings": 3}]
)
def test_an_answer_that_is_not_the_hubs(
    witness: Witness, server: Hub, monkeypatch: pytest.MonkeyPatch, answer: object
) -> None:
    monkeypatch.setattr(server, "describe", lambda repo: answer)
    error = witness.fails()
    assert str(error) == f"What answers at {server.url} does not speak as the Hub does."
    assert error.hint == "Check HF_ENDPOINT, and whether a log-in page stands in between."
