"""`phimlx config` and `phimlx persona`, and commands that follow them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result
from huggingface_hub import constants

from phimlx.cli.group import COMMANDS, cli
from phimlx.machine import doctor
from phimlx.terminal.conversation import Conversation
from tests.cli.test_history_cli import Loaded

Run = Callable[..., Result]
TOOLS = '[{"name": "search"}]'


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PHIMLX_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("PHIMLX_DATA_DIR", str(tmp_path / "data"))
    return tmp_path / "config"


@pytest.fixture
def run(folder: Path) -> Run:
    return lambda *arguments, input=None: CliRunner().invoke(cli, arguments, input=input)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch, run: Run) -> Loaded:
    return Loaded(monkeypatch, run)


def write(folder: Path, text: str, name: str = "config.toml") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_set_show_and_unset(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "config.toml"
    assert run("config").stdout == f"{path}, which is not there yet\n"
    assert run("config", "set", "temp", "0.5").stdout == f"temp = 0.5  in {path}\n"
    run("config", "set", "alias.work", "/models/mine")
    monkeypatch.setenv("PHIMLX_MODEL", "nano")
    assert run("config").stdout == (
        f"{path}\n\nsetting            value            from{' ' * (len(str(path)) - 4)}".rstrip()
        + "\n"
        f"{'─' * (36 + len(str(path)))}\n"
        'model              "nano"           PHIMLX_MODEL\n'
        f"temperature        0.5              {path}\n"
        f'alias.work.model   "/models/mine"   {path}\n'
    )
    assert json.loads(run("config", "--json").stdout) == {
        "path": str(path),
        "exists": True,
        "settings": [
            {"name": "model", "value": "nano", "source": "PHIMLX_MODEL"},
            {"name": "temperature", "value": 0.5, "source": str(path)},
            {"name": "alias.work.model", "value": "/models/mine", "source": str(path)},
        ],
    }
    assert run("config", "unset", "temp").stdout == f"temp is no longer set in {path}.\n"
    assert run("config", "unset", "temp").stdout == "temp was not set.\n"
    result = run("config", "set", "modle", "x")
    assert (result.exit_code, result.stderr) == (
        1,
        "Error: there is no setting 'modle'.\nHint: Did you mean model?\n",
    )


def test_edit_makes_the_file_and_looks_whether_it_holds(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder / "config.toml"
    monkeypatch.setenv("EDITOR", "true")
    monkeypatch.delenv("VISUAL", raising=False)
    assert run("config", "edit").stdout == f"{path} holds.\n"
    assert path.read_text().startswith("# Settings of phimlx.")
    assert json.loads(run("config", "--json").stdout)["settings"] == []
    path.write_text("modle = 1")
    assert run("config", "edit").stderr == (
        f"Error: {path}: there is no setting 'modle'.\n"
        "Hint: Did you mean model? Mend it: phimlx config edit\n"
    )
    monkeypatch.setenv("EDITOR", "false")
    result = run("config", "edit")
    assert (result.exit_code, result.stderr.splitlines()[0]) == (
        1,
        "Error: The editor could not be used: false: Editing failed",
    )


def test_a_broken_file_is_told_by_every_command_but_those_that_mend_it(
    loaded: Loaded, run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(folder, "model =")
    monkeypatch.setenv("EDITOR", "true")
    monkeypatch.setattr(doctor, "run_checks", lambda cache: iter(()))
    for arguments in (["chat"], ["list"], ["history", "list"], ["config"], ["cache", "list"]):
        result = run(*arguments)
        assert (result.exit_code, result.stdout) == (1, "")
        assert result.stderr.startswith(f"Error: {path} is not TOML (")
        assert result.stderr.endswith("Hint: Mend it: phimlx config edit\n")
    for command in COMMANDS:
        assert run(command, "--help").exit_code == 0
    result = run("doctor")
    assert result.exit_code == 1
    assert "settings: Mend it: phimlx config edit" in result.stdout


def test_doctor_says_what_comes_from_where(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(folder, "seed = 1\n[models.phi-4]\ntemperature = 0.8")
    monkeypatch.setenv("PHIMLX_MODEL", "nano")
    monkeypatch.setattr(doctor, "run_checks", lambda cache: iter(()))
    findings = json.loads(run("doctor", "--json").stdout)["findings"]
    assert findings[-1]["found"] == (
        f'model = "nano" from PHIMLX_MODEL; seed = 1 from {path}; '
        f"models.phi-4.temperature = 0.8 from {path}"
    )


FILE = """
model = "work"
temperature = 0.5
system = "Be brief."
kv-bits = 8
[models.nano]
temperature = 0.1
[alias.work]
model = "/models/mine"
adapter = "owner/letters"
seed = 3
"""


@pytest.mark.parametrize("command", ["chat", "generate"])
def test_an_alias_with_its_adapter_is_the_default(
    command: str, loaded: Loaded, folder: Path
) -> None:
    write(folder, FILE.replace("owner/letters", str(folder)))
    assert loaded(["One."], command, input="a\n").stdout == "One.\n"
    assert loaded.sources == [("/models/mine", str(folder))]
    assert loaded.phi.prompts[0][0] == {"role": "system", "content": "Be brief."}
    options = loaded.phi.options[0]
    assert (options["temperature"], options["seed"]) == (0.5, 3)
    assert (loaded.phi.kv_bits, options.get("kv_bits")) in ((8, None), (None, 8))


@pytest.mark.parametrize("command", ["chat", "generate"])
def test_flags_come_first(
    command: str, loaded: Loaded, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(folder, FILE)
    monkeypatch.setenv("PHIMLX_TEMPERATURE", "0.2")
    loaded(["One."], command, "--model", "nano", "--temp", "0", "--system", "x", input="a\n")
    assert loaded.sources == [("nano", None)]
    assert loaded.phi.options[0]["temperature"] == 0
    assert loaded.phi.prompts[0][0]["content"] == "x"
    loaded(["One."], command, "--model", "nano", input="a\n")
    assert loaded.phi.options[0]["temperature"] == 0.2
    monkeypatch.delenv("PHIMLX_TEMPERATURE")
    loaded(["One."], command, "--model", "nano", input="a\n")
    assert loaded.phi.options[0]["temperature"] == 0.1


def test_a_conversation_goes_on_as_it_was(loaded: Loaded, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    loaded(["One."], "chat", "--model", "nano", "--seed", "7", input=f"a\n/save {path}\n")
    write(folder, FILE)
    loaded(["Two."], "chat", "--continue", input="b\n")
    loaded(["Two."], "chat", "--load", str(path), input="b\n")
    assert loaded.sources[1:] == [("nano", None)] * 2
    assert loaded.phi.options[0]["seed"] == 7
    assert "temperature" not in loaded.phi.options[0]
    assert Conversation.load(path).system is None


def test_a_picture_does_without_the_default_model(
    loaded: Loaded, folder: Path, tmp_path: Path
) -> None:
    write(folder, FILE)
    (tmp_path / "cat.png").touch()
    loaded(["A cat."], "generate", "--image", str(tmp_path / "cat.png"), "What?")
    assert loaded.sources == [("phi-4-multimodal", None)]


def test_history_off(loaded: Loaded, folder: Path, tmp_path: Path) -> None:
    write(folder, "history = false")
    loaded(["One."], "chat", input="a\n")
    assert not (tmp_path / "data").exists()


def test_folders_are_told_to_who_reads_them_from_the_environment(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_HUB_CACHE", "HF_HOME", "PHIMLX_CACHE_LIMIT", "NO_COLOR"):
        monkeypatch.setenv(name, "before")  # so that it is put back afterwards
        monkeypatch.delenv(name)
    write(folder, 'store = "/elsewhere"\ncache-limit = 2.5\ntheme = "plain"')
    assert json.loads(run("cache", "list", "--json").stdout)["limit"] == 2_500_000_000
    assert (os.environ["HF_HUB_CACHE"], os.environ["NO_COLOR"]) == ("/elsewhere", "1")
    assert constants.HF_HUB_CACHE != "/elsewhere"  # in this process it was read long before
    for name in ("HF_HUB_CACHE", "PHIMLX_CACHE_LIMIT"):
        monkeypatch.setenv(name, "3")
    assert json.loads(run("cache", "list", "--json").stdout)["limit"] == 3_000_000_000
    assert os.environ["HF_HUB_CACHE"] == "3"


def test_a_command_that_is_looked_up_again_is_prepared_once(run: Run) -> None:
    context = click.Context(cli)
    for name in ("list", "history"):
        before = cli.get_command(context, name)
        assert before is not None
        inner = before.commands["list"] if isinstance(before, click.Group) else before
        callback = inner.callback
        assert cli.get_command(context, name) is before
        assert inner.callback is callback


PERSONA = 'system = "You write letters."\ntemperature = 0.9\ntools = "tools.json"\n'


def test_personas(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("persona", "list").stdout == (
        "There is no persona yet. Make one: phimlx persona edit NAME\n"
    )
    path = write(folder, PERSONA, "personas/letters.toml")
    write(folder, "modle = 1", "personas/broken.toml")
    result = run("persona", "list")
    assert result.stdout.splitlines()[2] == "letters   You write letters."
    assert "broken.toml: there is no setting 'modle'." in result.stderr
    assert run("persona", "show", "letters").stdout == (
        f'letters  {path}\nsystem = "You write letters."\ntemperature = 0.9\ntools = "tools.json"\n'
    )
    assert run("persona", "show", "leters").stderr == (
        "Error: There is no persona leters.\nHint: Did you mean letters?\n"
    )
    assert run("persona", "show", "other").stderr == (
        "Error: There is no persona other.\nHint: Make it: phimlx persona edit other\n"
    )
    assert run("persona", "show", "broken").stderr.endswith(
        "Hint: Did you mean model? Mend it: phimlx persona edit broken\n"
    )
    for name in ("../x", "", ".x", "a/b", "x" * 101):
        assert "is not a persona's name." in run("persona", "edit", "--", name).stderr
    monkeypatch.setenv("EDITOR", "true")
    made = folder / "personas" / "new.toml"
    assert run("persona", "edit", "new").stdout == f"{made} holds.\n"
    assert json.loads(run("persona", "show", "new", "--json").stdout)["system"] == "You are …"


@pytest.mark.parametrize("command", ["chat", "generate"])
def test_a_persona_stands_between_flags_and_settings(
    command: str, loaded: Loaded, folder: Path
) -> None:
    write(folder, 'model = "phi-4"\ntemperature = 0.5\nsystem = "x"\nseed = 1')
    more = f'model = "nano"\nadapter = "{folder}"\n'
    write(folder, more + PERSONA, "personas/letters.toml")
    write(folder, TOOLS, "personas/tools.json")
    loaded(["Dear."], command, "--persona", "letters", "--top-p", "0.3", input="a\n")
    assert loaded.sources == [("nano", str(folder))]
    options: dict[str, Any] = loaded.phi.options[0]
    assert {key: options[key] for key in ("temperature", "seed", "top_p", "tools")} == {
        "temperature": 0.9,
        "seed": 1,
        "top_p": 0.3,
        "tools": [{"name": "search"}],
    }
    assert loaded.phi.prompts[0][0]["content"] == "You write letters."
