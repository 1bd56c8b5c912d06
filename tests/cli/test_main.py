"""How every run begins and ends: imports, help, exit codes, messages."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

import phimlx
from phimlx.cli import main as main_module
from phimlx.cli.group import COMMANDS, cli
from phimlx.errors import PhimlxError
from tests.test_imports import HOME, python


def run(*arguments: str, cwd: Path = HOME) -> subprocess.CompletedProcess[str]:
    """`python -m phimlx ARGUMENT...` started in folder `cwd`."""
    return python("-m", "phimlx", *arguments, cwd=cwd)


def test_version() -> None:
    done = run("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"phimlx {phimlx.__version__}\n", "")


def test_help_lists_the_commands_in_their_order() -> None:
    result = CliRunner().invoke(cli, ["-h"])
    assert result.exit_code == 0
    listed = result.stdout.partition("Commands:\n")[2].splitlines()
    assert [line.split()[0] for line in listed] == list(COMMANDS)


@pytest.fixture
def stray(tmp_path: Path) -> Path:
    """A folder whose modules must never be imported for ours."""
    for name in ("convert", "click", "rich", "mlx", "jinja2", "tokenizers"):
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('imported stray {name}')\n")
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_stray_module_in_the_working_directory_is_not_imported(name: str, stray: Path) -> None:
    done = run(name, "--help", cwd=stray)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"Usage: phimlx {name} ")


def test_the_console_script_leaves_the_working_directory_too(stray: Path) -> None:
    script = (
        "import sys; sys.path.insert(0, '');"
        "from phimlx.cli.main import leave_working_directory, main;"
        "leave_working_directory(); import convert; print(convert.__file__);"
        "sys.argv = ['phimlx', '--version']; main()"
    )
    done = python("-c", script, cwd=stray)
    assert done.stderr == ""
    assert done.stdout == f"{HOME / 'convert' / '__init__.py'}\nphimlx {phimlx.__version__}\n"


@pytest.mark.parametrize(
    ("folder", "stays"), [("home", True), ("site-packages", True), ("x", False)]
)
def test_what_leaves_the_path(
    folder: str, stays: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = HOME if folder == "home" else tmp_path / folder
    here.mkdir(exist_ok=True)
    monkeypatch.chdir(here)
    monkeypatch.setattr("sys.path", ["", str(here), "/elsewhere"])
    main_module.leave_working_directory()
    assert sys.path == (["", str(here), "/elsewhere"] if stays else ["/elsewhere"])


def invoke(action: Callable[[], None], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Result:
    """The result of a command that does `action`."""
    module = types.ModuleType("a_command")
    module.command = click.command()(action)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "a_command", module)
    monkeypatch.setitem(COMMANDS, "act", ("a_command", "Act."))
    return CliRunner().invoke(cli, arguments or ["act"], prog_name="phimlx")


def fail_as_user() -> None:
    raise PhimlxError("The disk is full.", "Free 2 GB.")


def fail_unforeseen() -> None:
    raise ZeroDivisionError("division by zero")


def interrupt() -> None:
    raise KeyboardInterrupt


def abort() -> None:
    raise click.Abort


def misuse() -> None:
    raise click.UsageError("The prompt is empty.")


@pytest.mark.parametrize(
    ("action", "code", "message"),
    [
        (fail_as_user, 1, "Error: The disk is full.\nHint: Free 2 GB.\n"),
        (
            fail_unforeseen,
            1,
            "Error: unexpected ZeroDivisionError: division by zero\n"
            "Hint: Run it again with --debug to see where it happened.\n",
        ),
        (interrupt, 130, ""),
        (abort, 130, ""),
        (
            misuse,
            2,
            "Usage: phimlx act [OPTIONS]\nTry 'phimlx act --help' for help.\n\n"
            "Error: The prompt is empty.\n",
        ),
    ],
)
def test_how_a_run_ends(
    action: Callable[[], None], code: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = invoke(action, monkeypatch)
    assert (result.exit_code, result.stdout, result.stderr) == (code, "", message)


@pytest.mark.parametrize("arguments", [("--debug", "act"), ("act", "--debug")])
def test_debug_before_or_after_the_command_shows_the_traceback(
    arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    result = invoke(fail_unforeseen, monkeypatch, *arguments)
    assert result.exit_code == 1
    assert result.stderr.startswith("Traceback (most recent call last):\n")
    assert result.stderr.endswith(
        "ZeroDivisionError: division by zero\n"
        "Error: unexpected ZeroDivisionError: division by zero\n"
    )


def test_an_unknown_command_is_wrong_usage() -> None:
    result = CliRunner().invoke(cli, ["genrate"])
    assert (result.exit_code, result.stdout) == (2, "")
    assert "No such command 'genrate'. Did you mean 'generate'?" in result.stderr


def test_a_working_directory_that_is_gone(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    line = 'rmdir "$PWD"; exec "$@"'
    done = subprocess.run(
        ["sh", "-c", line, "sh", sys.executable, "-m", "phimlx", "--version"],
        cwd=gone,
        env={**os.environ, "PYTHONPATH": str(HOME)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, f"phimlx {phimlx.__version__}\n", "")
