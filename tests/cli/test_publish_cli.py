"""`phimlx convert --upload-repo`: what is printed, and how failures end."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from click.testing import CliRunner, Result
from huggingface_hub.utils import are_progress_bars_disabled  # type: ignore[attr-defined]

import phimlx
from phimlx.checkpoint.folder import Checkpoint
from phimlx.cli.group import cli
from tests.convert.tiny import PHI_4, parameters, write_model
from tests.hub.loopback_hub import Fault
from tests.hub.loopback_upload import ACCOUNT, Desk, serve_desk

HOME = Path(phimlx.__file__).parents[1]
REPO = "me/tiny"
USAGE = (
    "Usage: phimlx convert [OPTIONS] MODEL\nTry 'phimlx convert --help' for help.\n\nError: {}\n"
)


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    with serve_desk(monkeypatch, tmp_path / "hub") as running:
        yield running


@pytest.fixture
def source(tmp_path: Path) -> Path:
    source = write_model(tmp_path / "source", PHI_4, parameters(PHI_4, mx.bfloat16))
    (source / "tokenizer.json").write_text("{}")
    return source


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, ["convert", *map(str, arguments)], prog_name="phimlx")


def convert(source: Path, *more: str) -> Result:
    out = source.parent / "out"
    return run(source, "--out", out, "-q", "--q-group-size", "32", "--upload-repo", REPO, *more)


def test_what_a_person_reads(desk: Desk, source: Path, tmp_path: Path) -> None:
    result = convert(source)
    assert result.exit_code == 0
    out = tmp_path / "out"
    held = desk.hub.repos[REPO]
    assert held == {file.name: file.read_bytes() for file in out.iterdir()}
    nbytes = sum(map(len, held.values()))
    first, last = result.stdout.splitlines()
    assert first.startswith(f"{out}: 42.9 kB from 136 kB")
    assert last == f"{desk.hub.url}/{REPO}: 4 files, {nbytes / 1000:.1f} kB"
    assert result.stderr == (
        f"Try it: phimlx chat --model {out}\n"
        f"Uploading 4 files, {nbytes / 1000:.1f} kB, to {REPO}.\n"
    )
    assert not are_progress_bars_disabled()
    assert [message for message, _ in desk.commits] == ["Upload a model made with phimlx 0.1.0"]


def test_json_is_one_object_and_nothing_else(desk: Desk, source: Path, tmp_path: Path) -> None:
    result = convert(source, "--private", "--token", "hf_mine", "--json")
    assert result.exit_code == 0
    written: dict[str, Any] = json.loads(result.stdout)
    assert written["path"] == str(tmp_path / "out")
    assert written["upload"] == {
        "repository": REPO,
        "url": f"{desk.hub.url}/{REPO}",
        "commit": f"{1:040x}",
        "files": ["README.md", "config.json", "model.safetensors", "tokenizer.json"],
        "nbytes": sum(map(len, desk.hub.repos[REPO].values())),
    }
    assert desk.hub.private == {REPO}
    assert desk.tokens == {"Bearer hf_mine"}


@pytest.mark.slow
def test_the_report_is_in_the_card_that_goes(desk: Desk, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    arguments = ("-q", "--report", "--report-text", text, "--upload-repo", REPO)
    result = run("nano", "--out", tmp_path / "out", *arguments)
    assert result.exit_code == 0
    card = desk.hub.repos[REPO]["README.md"].decode()
    assert "\n## Quality\n" in card
    assert "| KL divergence, " in card
    assert (tmp_path / "out" / "report.json").is_file()
    assert "report.json" not in desk.hub.repos[REPO]


def test_a_folder_that_was_converted_before(desk: Desk, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(source, "--out", out)
    result = run("--mlx-path", out, "--upload-repo", REPO)
    assert result.exit_code == 0
    assert set(desk.hub.repos[REPO]) == {file.name for file in out.iterdir()}
    result = run("--mlx-path", out, "--upload-repo", REPO, "--json")
    assert result.stderr.splitlines()[0] == "me/tiny exists: this becomes its next commit."
    assert json.loads(result.stdout)["upload"]["repository"] == REPO


def test_a_failure_leaves_the_folder_and_says_what_goes_on(
    desk: Desk, source: Path, tmp_path: Path
) -> None:
    desk.faults["commit"] = [Fault(status=403)]
    result = convert(source, "--private")
    again = f"phimlx convert --mlx-path {tmp_path}/out --upload-repo me/tiny --private"
    assert result.exit_code == 1
    assert result.stderr.endswith(
        "Error: The Hub does not let this token write to me/tiny (403).\n"
        f"Hint: Check what the token may do at {desk.hub.url}/settings/tokens. The upload goes on "
        f"with: {again}\n"
    )
    assert Checkpoint(tmp_path / "out").tensors
    assert desk.commits == []
    desk.asked.clear()
    assert run(*shlex.split(again)[2:]).exit_code == 0
    assert "put" not in desk.asked
    assert len(desk.commits) == 1


def test_an_interrupt_leaves_the_folder_and_says_what_goes_on(
    desk: Desk, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object, **keywords: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub._commit_api._send_commit", interrupted)
        result = convert(source)
    out = tmp_path / "out"
    assert result.exit_code == 130
    assert result.stderr.endswith(
        f"Stopped. {out} is whole; the upload goes on with: phimlx convert --mlx-path {out} "
        "--upload-repo me/tiny\n"
    )
    assert Checkpoint(out).tensors
    assert run("--mlx-path", out, "--upload-repo", REPO).exit_code == 0
    assert desk.hub.repos[REPO] == {file.name: file.read_bytes() for file in out.iterdir()}


class Held(dict[str, bytes]):
    """A storage that takes nothing before it is released."""

    def __init__(self) -> None:
        self.arrived, self.release = threading.Event(), threading.Event()

    def __setitem__(self, name: str, content: bytes) -> None:
        self.arrived.set()
        self.release.wait(60)
        super().__setitem__(name, content)


@pytest.mark.slow
def test_a_signal_while_bytes_go_out_does_not_wait_for_them(
    desk: Desk, source: Path, tmp_path: Path
) -> None:
    desk.stored = held = Held()
    out = tmp_path / "out"
    run(source, "--out", out)
    environment = {"HF_ENDPOINT": desk.hub.url, "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(HOME)}
    process = subprocess.Popen(
        [sys.executable, "-m", "phimlx", "convert", "--out", str(out), "--upload-repo", REPO],
        env={**os.environ, **environment},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert held.arrived.wait(60)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    held.release.set()
    assert process.returncode == 130
    assert said.splitlines()[-1].startswith(f"Stopped. {out} is whole;")
    assert desk.commits == []


def test_what_the_hub_would_refuse_is_refused_before_the_conversion(
    desk: Desk, source: Path, tmp_path: Path
) -> None:
    access = {"type": "access_token", "accessToken": {"role": "read"}}
    desk.account = {**ACCOUNT, "auth": access}
    result = convert(source)
    assert result.exit_code == 1
    assert result.stderr == (
        "Error: This token may not write to me/tiny.\n"
        f"Hint: Make one that may at {desk.hub.url}/settings/tokens, then log in with: hf auth "
        "login\n"
    )
    assert not (tmp_path / "out").exists()


def test_a_folder_that_exists_is_not_taken_for_the_conversion(
    desk: Desk, source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    result = convert(source)
    assert result.exit_code == 1
    assert result.stderr == (
        f"Error: {out} exists already.\nHint: Choose another folder, or upload this one as it is "
        f"with: phimlx convert --mlx-path {out} --upload-repo me/tiny\n"
    )
    assert desk.asked == []


def test_half_a_model_is_not_uploaded(desk: Desk, source: Path) -> None:
    (source / "model.safetensors").unlink()
    result = run("--mlx-path", source, "--upload-repo", REPO)
    assert result.exit_code == 1
    assert "holds no model.safetensors" in result.stderr
    assert desk.asked == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "--out", "x", "--private"], "--private goes with --upload-repo."),
        (
            ["--out", "no/where", "--upload-repo", REPO],
            "MODEL is missing, and there is no folder no/where to upload.",
        ),
        (
            ["--out", "x", "--upload-repo", REPO, "-q"],
            "MODEL is missing: --quantize goes with a conversion.",
        ),
        (
            ["a", "--out", "x", "--upload-repo", REPO, "--export", "gguf"],
            "--upload-repo publishes model folders: leave it out of --export gguf.",
        ),
    ],
)
def test_wrong_usage(arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stderr == USAGE.format(message)
