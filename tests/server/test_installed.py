"""The server as a service: its description, and what is asked of the service manager."""

from __future__ import annotations

import os
import plistlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from phimlx.cli.group import cli
from phimlx.cli.serve import command
from phimlx.options import from_flags, to_flags
from phimlx.server import installed
from phimlx.server.installed import Launchd, Systemd
from phimlx.server.settings import ServerSettings

COMMAND = ["/opt/a b/python", "-m", "phimlx", "serve", "--api-key-file", '/home/me/50% "of" $it']
ENVIRONMENT = {"HF_HOME": "/Volumes/My Models"}

# A manager that notes what it is asked, refuses what REFUSE names, and runs what has been started.
FAKE = """#!/bin/sh
echo "$@" >> "$ASKED"
case "$*" in *"$REFUSE"*) echo no such luck >&2; exit 5;; esac
case "$*" in
  *" enable "*|bootstrap*) touch "$ASKED.runs";;
  *" disable "*|bootout*) rm -f "$ASKED.runs";;
  *is-active*|print*) test -e "$ASKED.runs";;
esac
"""


@pytest.fixture(params=["darwin", "linux"])
def asked(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file in which a system's manager notes what it is asked."""
    tool = {"darwin": "launchctl", "linux": "systemctl"}[request.param]
    fake = tmp_path / "bin" / tool
    fake.parent.mkdir()
    fake.write_text(FAKE)
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "platform", request.param)
    monkeypatch.setenv("PATH", f"{fake.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("ASKED", str(tmp_path / "asked"))
    monkeypatch.setenv("REFUSE", "nothing of it")
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    for name in installed.KEPT[1:]:
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "asked"


def serve(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(cli, ["serve", "--port", "0", "--model", "nano", *arguments])
    return done.exit_code, done.output


def test_a_service_comes_and_goes(asked: Path) -> None:
    path = installed.service_manager().path
    assert serve("--status")[0] == 1
    code, said = serve("--install")
    assert (code, f"Installed as {path}." in said) == (0, True)
    description = path.read_text()
    for word in (sys.executable, "serve", "--model", "nano", "--port"):
        assert word in description
    assert serve("--status") == (0, serve("--status")[1])
    assert "The service runs" in serve("--status")[1]
    assert serve("--install")[0] == 0  # again, with other settings
    assert serve("--uninstall") == (0, "The service is gone.\n")
    assert not path.exists()
    assert serve("--uninstall") == (0, "There is no service.\n")
    assert serve("--status")[0] == 1


def test_a_manager_that_refuses_leaves_nothing(
    asked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = installed.service_manager()
    starting = manager.start_commands()[-1]
    monkeypatch.setenv("REFUSE", starting[1] if len(starting) == 4 else "enable")
    code, said = serve("--install")
    assert code == 1
    assert f"Error: {manager.name} does not start the service: no such luck\n" in said
    assert not manager.path.exists()


def test_a_key_is_not_written_down(asked: Path) -> None:
    code, said = serve("--install", "--api-key", "secret")
    assert (code, "--api-key-file" in said) == (2, True)


def test_systems_without_a_manager_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    code, said = serve("--status")
    assert code == 1
    assert "so nothing can start the server." in said


def test_a_service_has_the_settings_that_were_given() -> None:
    settings = ServerSettings(
        model="-odd name", cors=("https://a.example", "https://b.example"), fetch_media=True, port=1
    )
    params = command.make_context("serve", to_flags(settings)).params
    given = {name: value for name, value in params.items() if name in ServerSettings.model_fields}
    assert from_flags(ServerSettings, given) == settings


def test_launchd_reads_the_description(tmp_path: Path) -> None:
    found = plistlib.loads(Launchd(tmp_path).describe(COMMAND, ENVIRONMENT))
    assert found["ProgramArguments"] == COMMAND
    assert found["EnvironmentVariables"] == ENVIRONMENT
    assert found["KeepAlive"] == {"SuccessfulExit": False}
    assert Path(found["StandardErrorPath"]).parent.is_dir()


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd-analyze")
def test_systemd_reads_the_description(tmp_path: Path) -> None:
    script = tmp_path / 'a b 50% "c" $d'
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    unit = tmp_path / "phimlx.service"
    unit.write_bytes(Systemd(tmp_path).describe([sys.executable, str(script)], ENVIRONMENT))
    command = ["systemd-analyze", "--user", "verify", str(unit)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert "phimlx.service" not in done.stderr


def test_check_says_what_would_run(tmp_path: Path) -> None:
    code, said = serve("--check")
    assert code == 0
    assert said.splitlines()[0].endswith("/v1, without a key:")
    assert said.splitlines()[1].split()[0] == "nano"
    broken = tmp_path / "cert.pem"
    broken.write_text("no certificate")
    code, said = serve("--check", "--ssl-certfile", str(broken))
    assert (code, "is no certificate with its key" in said) == (1, True)
