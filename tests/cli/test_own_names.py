"""A name of the user's own, wherever a model is named."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import phimlx
from phimlx.cli.group import cli
from phimlx.errors import ModelNotFoundError, SettingsError
from tests.convert.test_fuse import SETTINGS, adapter_for
from tests.terminal.fake_phi import FakePhi
from tests.training.folder import write_tiny


@pytest.fixture(autouse=True)
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Settings in which work is the small model that comes along, and home it with an adapter."""
    path = tmp_path / "config.toml"
    path.write_text(
        '[alias]\nwork = "nano"\n[alias.home]\nmodel = "nano"\nadapter = "letters/mine"\n'
    )
    monkeypatch.setenv("PHIMLX_CONFIG_DIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return path


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, arguments, prog_name="phimlx")


DATA = "rows.jsonl"
COMMANDS = [
    ("show", "{}"),
    ("download", "{}"),
    ("remove", "{}", "-y"),
    ("convert", "{}", "--mlx-path", "out", "-q"),
    ("fuse", "--model", "{}", "--adapter-path", "nope", "--save-path", "out"),
    ("train", "--model", "{}", "--data", DATA, "--check"),
    ("serve", "{}", "--check", "--port", "0"),
    ("generate", "--model", "{}", "--private", "--max-tokens", "3", "Hi"),
    ("evaluate", "--model", "{}", "--data", DATA),
]


@pytest.mark.parametrize("arguments", COMMANDS, ids=lambda arguments: arguments[0])
def test_every_command_takes_it_for_the_model(arguments: tuple[str, ...], config: Path) -> None:
    row = {"prompt": "2 + 2 =", "completion": "4"}
    (config.parent / DATA).write_text(f"{json.dumps(row)}\n" * 4)
    done = {}
    for name in ("nano", "work"):
        result = run(*(each.format(name) for each in arguments))
        done[name] = (result.exit_code, *map(without_port, (result.stdout, result.stderr)))
        if arguments[0] == "convert":
            assert result.exit_code == 0
            (config.parent / "out").rename(config.parent / f"out-{name}")
    assert done["work"] == done["nano"]


def without_port(text: str) -> str:
    """A text without what differs from run to run: ports, seconds."""
    words = re.sub(r"\d+\.\d s\b", "", text).split()
    return " ".join(word for word in words if not word.startswith(("http:", "out")))


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Any]]:
    """Models that commands load, each with its adapter."""
    found: list[tuple[Any, Any]] = []

    def load(source: Any, adapter: Any = None, *rest: Any, **more: Any) -> FakePhi:
        found.append((source, adapter))
        return FakePhi("Hello.")

    monkeypatch.setattr("phimlx.api.load", load)
    return found


def test_its_adapter_goes_with_it(config: Path, loaded: list[tuple[Any, Any]]) -> None:
    (config.parent / "letters" / "mine").mkdir(parents=True)
    (config.parent / DATA).write_text(json.dumps({"prompt": "2 +", "completion": "4"}))
    adapter = str(config.parent / "letters" / "mine")
    assert run("generate", "--model", "home", "--private", "Hi").exit_code == 0
    run("evaluate", "--model", "home", "--data", DATA)
    run("evaluate", "--model", "home", "--adapter-path", adapter, "--data", DATA)
    assert [(model, Path(of).resolve()) for model, of in loaded] == [("nano", Path(adapter))] * 3


def test_its_adapter_is_fused(config: Path) -> None:
    write_tiny(config.parent / "tiny")
    adapter_for(config.parent / "tiny", config.parent / "letters", SETTINGS["lora"])
    config.write_text('[alias.home]\nmodel = "./tiny"\nadapter = "letters"\n')
    (config.parent / "rows.jsonl").write_text('{"prompt": "2 +", "completion": "4"}\n' * 4)
    assert run("fuse", "--model", "home", "--save-path", "one").exit_code == 0
    assert (
        run("fuse", "--model", "./tiny", "--adapter-path", "letters", "--save-path", "two")
    ).exit_code == 0
    one, two = (
        (config.parent / name / "model.safetensors").read_bytes() for name in ("one", "two")
    )
    assert one == two
    served = json.loads(run("serve", "home", "--check", "--port", "0", "--json").stdout)["models"]
    assert [model["name"] for model in served] == ["tiny", "tiny:home"]
    measured = run("evaluate", "--model", "home", "--data", "rows.jsonl", "--json")
    assert json.loads(measured.stdout)["adapter"] == "letters"


def test_where_it_is_left_out_that_is_said(config: Path) -> None:
    write_tiny(config.parent / "tiny")
    config.write_text('[alias.home]\nmodel = "./tiny"\nadapter = "letters"\nsystem = "Be kind."\n')
    (config.parent / "rows.jsonl").write_text('{"prompt": "2 +", "completion": "4"}\n' * 4)
    done = run("convert", "home", "--mlx-path", "out")
    assert done.exit_code == 0
    assert "The adapter of home is left out; to fuse it: --adapter-path letters\n" in done.stderr
    done = run("train", "--model", "home", "--data", "rows.jsonl", "--check")
    assert done.exit_code == 0
    assert "A new adapter is trained; that of home, letters, is left out.\n" in done.stderr
    config.write_text('[alias.home]\nmodel = "./tiny"\nsystem = "Be kind."\n')
    done = run("serve", "home", "--check", "--port", "0")
    assert done.stderr == "Clients say what the model is told, not home's system prompt.\n"


def test_python_knows_it_too() -> None:
    assert phimlx.load("work").name == phimlx.load("nano").name
    with pytest.raises(ModelNotFoundError, match=r"letters/mine"):
        phimlx.load("home")


@pytest.mark.parametrize("name", ["nano", "owner/name", "./folder", Path("folder")])
def test_other_names_do_without_the_settings(name: str | Path, config: Path) -> None:
    config.write_text("nope")
    with pytest.raises(SettingsError):
        phimlx.load("work")
    if name == "nano":
        phimlx.load(name)
    else:
        with pytest.raises(ModelNotFoundError):
            phimlx.load(name)
