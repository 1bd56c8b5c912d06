"""The server as a service of the user's session: launchd's on macOS, systemd's on Linux.

Sources: launchd.plist(5), launchctl(1); systemd.service(5), systemctl(1).
"""

from __future__ import annotations

import os
import plistlib
import shutil
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path

from phimlx.errors import PhimlxError, clipped
from phimlx.files import translate_write_errors, write_file
from phimlx.hub.layout import VARIABLE

LABEL = "phimlx.serve"
SECONDS = 60  # that a service manager may take to answer
KEPT = ("PATH", "HF_HOME", VARIABLE, "HF_ENDPOINT", "PHIMLX_CACHE_LIMIT")
"""Variables that the service gets too, where they are set."""


class ServiceManager(ABC):
    """What starts a program when its user logs in, and again where it fails.

    Attributes:
        path: of the file that describes the service.
        logs: where people find what it says.
    """

    name: str
    path: Path
    logs: str

    @abstractmethod
    def describe(self, command: Sequence[str], environment: Mapping[str, str]) -> bytes:
        """Write the file of a service that runs a command."""

    @abstractmethod
    def start_commands(self) -> list[list[str]]: ...

    @abstractmethod
    def stop_commands(self) -> list[list[str]]: ...

    @abstractmethod
    def state_command(self) -> list[str]:
        """A command that succeeds while the service runs."""

    def install(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """Describe the service, in place of what it was, and start it.

        Raises:
            PhimlxError: where the file cannot be written, or the manager refuses.
        """
        if self.path.exists():
            self._run_all(self.stop_commands(), may_fail=True)
        with translate_write_errors(self.path, PhimlxError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_file(self.path, self.describe(command, environment), private=True)
        try:
            self._run_all(self.start_commands())
        except PhimlxError:
            self.path.unlink()
            raise

    def uninstall(self) -> bool:
        """Stop the service and forget it; False where there is none."""
        if not self.path.exists():
            return False
        self._run_all(self.stop_commands(), may_fail=True)
        with translate_write_errors(self.path, PhimlxError):
            self.path.unlink()
        return True

    def is_installed(self) -> bool:
        return self.path.exists()

    def is_running(self) -> bool:
        return _run(self.state_command()).returncode == 0

    def _run_all(self, commands: Sequence[Sequence[str]], may_fail: bool = False) -> None:
        for command in commands:
            done = _run(command)
            if done.returncode and not may_fail:
                said = clipped((done.stderr or done.stdout).strip()) or f"exit {done.returncode}"
                raise PhimlxError(
                    f"{self.name} does not start the service: {said}",
                    hint=f"{self.logs[0].upper()}{self.logs[1:]}.",
                )


class Launchd(ServiceManager):
    """The service manager of macOS."""

    name = "launchd"

    def __init__(self, home: Path) -> None:
        self.path = home / "Library" / "LaunchAgents" / f"{LABEL}.plist"
        self._log = home / "Library" / "Logs" / "phimlx" / "serve.log"
        self.logs = f"the log is {self._log}"
        self._domain = f"gui/{os.getuid()}"

    def describe(self, command: Sequence[str], environment: Mapping[str, str]) -> bytes:
        self._log.parent.mkdir(parents=True, exist_ok=True)
        return plistlib.dumps(
            {
                "Label": LABEL,
                "ProgramArguments": list(command),
                "EnvironmentVariables": dict(environment),
                "RunAtLoad": True,
                "KeepAlive": {"SuccessfulExit": False},
                "ThrottleInterval": 30,
                "ProcessType": "Interactive",
                "StandardOutPath": str(self._log),
                "StandardErrorPath": str(self._log),
            }
        )

    def start_commands(self) -> list[list[str]]:
        return [["launchctl", "bootstrap", self._domain, str(self.path)]]

    def stop_commands(self) -> list[list[str]]:
        return [["launchctl", "bootout", f"{self._domain}/{LABEL}"]]

    def state_command(self) -> list[str]:
        return ["launchctl", "print", f"{self._domain}/{LABEL}"]


class Systemd(ServiceManager):
    """The service manager of most Linux systems, the user's own instance of it."""

    name = "systemd"
    unit = "phimlx.service"

    def __init__(self, home: Path) -> None:
        config = Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config")
        self.path = config / "systemd" / "user" / self.unit
        self.logs = f"read the log with: journalctl --user -u {self.unit}"

    def describe(self, command: Sequence[str], environment: Mapping[str, str]) -> bytes:
        variables = "".join(
            f"Environment={_quoted(f'{name}={value}')}\n" for name, value in environment.items()
        )
        return (
            "[Unit]\nDescription=phimlx serve\nAfter=network.target\n\n"
            f"[Service]\nExecStart={' '.join(map(_quoted, command))}\n{variables}"
            "Restart=on-failure\nRestartSec=30\n\n"
            "[Install]\nWantedBy=default.target\n"
        ).encode()

    def start_commands(self) -> list[list[str]]:
        return [
            ["systemctl", "--user", "daemon-reload"],
            ["systemctl", "--user", "enable", "--now", self.unit],
        ]

    def stop_commands(self) -> list[list[str]]:
        return [["systemctl", "--user", "disable", "--now", self.unit]]

    def state_command(self) -> list[str]:
        return ["systemctl", "--user", "--quiet", "is-active", self.unit]


def _quoted(text: str) -> str:
    """Quote a word of a unit file, where %, $, quotes and backslashes mean something."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return '"' + escaped.replace("\n", "\\n") + '"'


MANAGERS = {"darwin": Launchd, "linux": Systemd}


def service_manager() -> ServiceManager:
    """Find this system's service manager.

    Raises:
        PhimlxError: where it has none that is known.
    """
    kind = MANAGERS.get(sys.platform)
    tool = {"darwin": "launchctl", "linux": "systemctl"}.get(sys.platform, "")
    if kind is None or shutil.which(tool) is None:
        raise PhimlxError(
            f"There is no {tool or 'service manager'} here, so nothing can start the server.",
            hint="Run `phimlx serve` in what starts programs here.",
        )
    manager: ServiceManager = kind(Path.home())
    return manager


def serve_command(arguments: Sequence[str]) -> list[str]:
    """The command that a service runs."""
    return [sys.executable, "-m", "phimlx", "serve", *arguments]


def kept_environment() -> dict[str, str]:
    """The variables that a service gets too."""
    return {name: os.environ[name] for name in KEPT if os.environ.get(name)}


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=SECONDS, check=False, errors="replace"
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PhimlxError(f"{command[0]} cannot be run: {error}.") from error
