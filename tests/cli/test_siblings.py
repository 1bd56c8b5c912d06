"""Models of Microsoft's that phimlx does not run: every command says which, and what to use."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from phimlx import catalog
from phimlx.catalog import SIBLINGS, Sibling
from phimlx.cli.group import cli
from phimlx.hub.resolve import NANO

COMMANDS: dict[str, Callable[[str], list[str]]] = {
    "show": lambda name: ["show", name],
    "generate": lambda name: ["generate", "--model", name, "--prompt", "x"],
    "convert": lambda name: ["convert", name, "--mlx-path", "out"],
    "serve": lambda name: ["serve", "--model", name, "--check"],
    "train": lambda name: ["train", "--model", name, "--data", "rows.jsonl"],
    "bench": lambda name: ["bench", "--model", name],
}


def said(sibling: Sibling) -> str:
    return (
        f"Error: {sibling.name} is not among the models that phimlx runs: {sibling.reason}.\n"
        f"Hint: Use {sibling.instead} in its place: phimlx download {sibling.instead}\n"
    )


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(cli, arguments, prog_name="phimlx")
    return result.exit_code, result.stderr


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    return tmp_path


@pytest.mark.parametrize("sibling", SIBLINGS, ids=lambda sibling: sibling.model_type)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_is_told_by_its_config(command: str, sibling: Sibling, in_tmp: Path) -> None:
    folder = in_tmp / "model"
    shutil.copytree(NANO, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": sibling.model_type}))
    assert run(*COMMANDS[command](str(folder))) == (1, said(sibling))
    assert not (in_tmp / "out").exists()


@pytest.mark.parametrize("sibling", SIBLINGS, ids=lambda sibling: sibling.model_type)
@pytest.mark.parametrize("command", [*COMMANDS, "download"])
@pytest.mark.parametrize("form", ["{}", "microsoft/{}", "mlx-community/{}-4bit"])
def test_a_name_is_enough(command: str, sibling: Sibling, form: str, in_tmp: Path) -> None:
    commands = {**COMMANDS, "download": lambda name: ["download", name]}
    for name in (sibling.name, *sibling.others[:1]):
        assert run(*commands[command](form.format(name))) == (1, said(sibling))


def test_what_is_named_in_their_place_runs() -> None:
    names = [sibling.name.lower() for sibling in SIBLINGS]
    assert names == ["phi-3-small", "phi-3.5-moe", "phi-3.5-vision"]
    for sibling in SIBLINGS:
        assert catalog.find(sibling.instead) is not None
    for model in catalog.FAMILY:
        assert not [name for name in model.names if catalog.sibling(name)]
