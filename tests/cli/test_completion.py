"""What a shell offers at a press of Tab, and how its script is put in place."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.shell_completion import CompletionItem, get_completion_class
from click.testing import CliRunner, Result

from phimlx import catalog
from phimlx.cli.completion import SHELLS
from phimlx.cli.group import COMMANDS, COMPLETING, cli
from tests.cli.test_list_cli import cache, keep

__all__ = ["cache"]  # a fixture

ALIASES = [model.alias for model in catalog.FAMILY]
PERSONA = 'system = "Be brief."\n'
CONFIG = '[alias.mine]\nmodel = "nano"\n'


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """A user with an alias, a persona, a model and an adapter."""
    folder = tmp_path / "config"
    (folder / "personas").mkdir(parents=True)
    (folder / "config.toml").write_text(CONFIG)
    (folder / "personas" / "pirate.toml").write_text(PERSONA)
    monkeypatch.setenv("PHIMLX_CONFIG_DIR", str(folder))
    keep(cache, "someone/tune")


def offered(*words: str) -> list[CompletionItem]:
    """What is offered for the last word."""
    kind = get_completion_class("bash")
    assert kind is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(COMPLETING, "bash_complete")
        return kind(cli, {}, "phimlx", COMPLETING).get_completions([*words[:-1]], words[-1])


def names(*words: str) -> list[str]:
    return [item.value for item in offered(*words)]


def test_commands() -> None:
    assert names("") == list(COMMANDS)
    assert names("co") == ["convert", "config", "completion"]
    assert names("help", "ch") == ["chat"]
    assert names("history", "sh") == ["show"]
    assert names("chta", "ch") == ["chat"]  # no error, though the first word is none


@pytest.mark.parametrize(
    "words",
    [("show",), ("chat",), ("run",), ("pull",), ("serve",), ("remove",), ("convert",)]
    + [(name, "--model") for name in ("chat", "generate", "train", "fuse", "evaluate", "serve")],
    ids=" ".join,
)
def test_models(words: tuple[str, ...]) -> None:
    assert names(*words, "") == ["mine", *ALIASES, "someone/tune"]
    assert names(*words, "some") == ["someone/tune"]
    assert [item.type for item in offered(*words, "./")] == ["dir"]


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        (("generate", "--image"), "file"),
        (("generate", "--tools"), "file"),
        (("generate", "--schema"), "file"),
        (("chat", "--load"), "file"),
        (("transcribe",), "file"),
        (("transcribe", "-o"), "file"),
        (("train", "--data"), "file"),
        (("train", "--adapter-path"), "dir"),
        (("chat", "--adapter-path"), "dir"),
        (("convert", "--mlx-path"), "dir"),
        (("serve", "--ssl-certfile"), "file"),
        (("history", "export", "-o"), "file"),
    ],
)
def test_files_and_folders(words: tuple[str, ...], kind: str) -> None:
    (item,) = offered(*words, "x")
    assert (item.type, item.value) == (kind, "x")


def test_settings() -> None:
    assert names("config", "set", "temp") == ["temperature"]
    assert names("config", "unset", "alias.mine.a") == ["alias.mine.adapter"]
    assert names("config", "set", "nope") == []


def test_personas_and_choices() -> None:
    assert names("chat", "--persona", "p") == ["pirate"]
    assert names("persona", "show", "") == ["pirate"]
    assert names("train", "--optimizer", "ada") == ["adamw", "adam", "adafactor"]
    assert names("completion", "") == list(SHELLS)


def test_a_broken_file_of_settings_ends_no_completion(tmp_path: Path) -> None:
    (tmp_path / "config" / "config.toml").write_text("nope")
    assert names("chat", "nano") == ["nano", "nano-multimodal"]
    assert names("config", "set", "temp") == ["temperature"]


# The scripts


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["completion", *arguments], prog_name="phimlx")


@pytest.mark.parametrize("shell", SHELLS)
def test_a_script_asks_phimlx(shell: str) -> None:
    result = run(shell)
    assert (result.exit_code, result.stderr) == (0, "")
    assert f"{COMPLETING}={shell}_complete" in result.stdout


def test_the_usual_shell_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHELL", "/opt/homebrew/bin/fish")
    assert run().stdout == run("fish").stdout
    monkeypatch.setenv("SHELL", "/bin/tcsh")
    result = run()
    assert result.exit_code == 2
    assert result.stderr.endswith("Error: Which shell is it for? Name one: bash, zsh, fish.\n")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "home $x"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("PHIMLX_DATA_DIR", str(folder / "data"))
    for name in ("XDG_CONFIG_HOME", "ZDOTDIR"):
        monkeypatch.delenv(name, raising=False)
    return folder


@pytest.mark.parametrize("platform", ["linux", "darwin"])
@pytest.mark.parametrize("before", [None, "", "alias a=b", "alias a=b\n"])
@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_install_adds_one_line_once(
    shell: str, before: str | None, platform: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    bash = ".bash_profile" if platform == "darwin" else ".bashrc"
    own = home / {"bash": bash, "zsh": ".zshrc"}[shell]
    if before is not None:
        own.write_text(before)
    path = home / "data" / f"completion.{shell}"
    first, second = run(shell, "--install"), run(shell, "--install")
    assert first.stdout == f"Wrote {path}.\nWrote {own}.\n"
    assert second.stdout == f"Wrote {path}.\n"
    assert path.read_text() == run(shell).stdout
    assert own.read_text() == ("alias a=b\n" if before else "") + (
        f"[ -r '{path}' ] && . '{path}'  # completion of phimlx\n"
    )


def test_install_for_fish_writes_one_file(home: Path) -> None:
    path = home / ".config" / "fish" / "completions" / "phimlx.fish"
    assert run("fish", "--install").stdout == f"Wrote {path}.\n"
    assert path.read_text() == run("fish").stdout
    assert [each.name for each in home.iterdir()] == [".config"]


def test_a_file_that_cannot_be_written_is_said(home: Path) -> None:
    (home / "data").write_text("")
    result = run("bash", "--install")
    assert (result.exit_code, result.stdout) == (1, "")
    assert str(home / "data") in result.stderr
    assert not (home / ".bashrc").exists()


@pytest.mark.slow
def test_bash_completes_what_it_is_told(home: Path) -> None:
    (home / "bin").mkdir()
    (home / "bin" / "phimlx").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m phimlx "$@"\n')
    (home / "bin" / "phimlx").chmod(0o755)
    assert run("bash", "--install").exit_code == 0
    script = """
        . ~/.bashrc
        COMP_WORDS=(phimlx chat nano-); COMP_CWORD=2
        _phimlx_completion phimlx
        echo "${COMPREPLY[@]}"
    """
    path = f"{home / 'bin'}:{os.environ['PATH']}"
    repository = Path(__file__).parents[2]
    done = subprocess.run(
        ["bash", "--norc", "-c", script],
        env={**os.environ, "PATH": path},
        cwd=repository,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("nano-multimodal\n", "")
