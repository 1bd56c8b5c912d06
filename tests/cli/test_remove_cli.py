"""`phimlx remove`: the question, the answer, and what it will not remove."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from huggingface_hub import constants

from phimlx.cli.group import cli
from phimlx.terminal.output import Output

QUANTIZED = "mlx-community/phi-4-4bit"
ORIGINAL = "microsoft/phi-4"


def run(*arguments: str, input: str | None = None) -> Result:
    return CliRunner().invoke(cli, ["remove", *arguments], input=input, prog_name="phimlx")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store with two models of 3 kB."""
    folder = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.chdir(tmp_path)
    for repo in (QUANTIZED, ORIGINAL):
        blobs = folder / f"models--{repo.replace('/', '--')}" / "blobs"
        blobs.mkdir(parents=True)
        (blobs / ("a" * 64)).write_bytes(bytes(2000))
        (blobs / ("b" * 64 + ".phimlx.incomplete")).write_bytes(bytes(1000))
    return folder


def here(cache: Path) -> set[str]:
    homes = cache.glob("models--*")
    return {home.name.removeprefix("models--").replace("--", "/") for home in homes}


@pytest.mark.parametrize(
    ("arguments", "removed"),
    [
        (["phi-4"], QUANTIZED),
        (["phi-4", "--original"], ORIGINAL),
        ([ORIGINAL], ORIGINAL),
        ([QUANTIZED], QUANTIZED),
    ],
)
def test_without_asking(cache: Path, arguments: list[str], removed: str) -> None:
    result = run(*arguments, "--yes")
    assert result.exit_code == 0
    assert result.stdout == f"Deleted {removed}: 3.00 kB are free again.\n"
    assert result.stderr == ""
    assert here(cache) == {QUANTIZED, ORIGINAL} - {removed}


def test_an_alias_means_the_original_where_only_that_is_here(cache: Path) -> None:
    assert run("phi-4", "--yes").exit_code == 0
    assert run("phi-4", "--yes").stdout == f"Deleted {ORIGINAL}: 3.00 kB are free again.\n"
    assert here(cache) == set()


@pytest.mark.parametrize("answer", ["y\n", "n\n", "\n"])
def test_asking(cache: Path, monkeypatch: pytest.MonkeyPatch, answer: str) -> None:
    monkeypatch.setattr(Output, "can_ask", True)
    result = run("phi-4", input=answer)
    assert result.stderr.startswith(f"Delete {QUANTIZED}, 3.00 kB? [y/N]: ")
    if answer == "y\n":
        assert (result.exit_code, here(cache)) == (0, {ORIGINAL})
    else:
        assert result.stderr.endswith("Nothing is deleted.\n")
        assert (result.exit_code, here(cache)) == (130, {QUANTIZED, ORIGINAL})


def test_json(cache: Path) -> None:
    result = run("phi-4", "--yes", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout) == {"model": "phi-4", "repository": QUANTIZED, "bytes": 3000}
    assert result.stderr == ""


def test_nobody_to_ask(cache: Path) -> None:
    result = run("phi-4")
    assert result.exit_code == 2
    assert result.stderr.endswith(
        "Error: Nobody can be asked here: add --yes to delete without asking.\n"
    )
    assert here(cache) == {QUANTIZED, ORIGINAL}


@pytest.mark.parametrize(
    ("name", "stderr"),
    [
        ("nano", "Error: nano comes with phimlx and goes with it.\n"),
        (
            "./hub",
            "Error: ./hub is a folder; only models in the Hub's cache are removed.\n"
            "Hint: Delete the folder yourself.\n",
        ),
        (
            "phi-4-mini",
            "Error: phi-4-mini is not on this machine.\nHint: See what is with: phimlx list\n",
        ),
        (
            "phi-4-minni",
            "Error: phi-4-minni is neither a folder, an alias nor a Hub id.\n"
            "Hint: Did you mean phi-4-mini?\n",
        ),
    ],
)
def test_what_is_not_removed(cache: Path, name: str, stderr: str) -> None:
    result = run(name, "--yes")
    assert result.exit_code == 1
    assert result.stderr == stderr
    assert here(cache) == {QUANTIZED, ORIGINAL}
