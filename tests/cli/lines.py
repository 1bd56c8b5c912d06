"""A line of arguments for every command of click's tree that ends well, and a place to run it in.

Models are tiny or scripted, the Hub is silent, and all folders of the user's are in one.
"""

from __future__ import annotations

import codecs
import contextlib
import os
import plistlib  # noqa: F401 (what commands import later may not be read by nobody)
import shlex
import shutil
import sys
import termios  # noqa: F401
import tomllib  # noqa: F401
import tty  # noqa: F401
import webbrowser  # noqa: F401
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest
from huggingface_hub import constants

from phimlx import api
from phimlx.cli.group import COMMANDS, cli
from phimlx.cli.main import main
from phimlx.evaluation import bench, bundled
from phimlx.generation.reply import Reply
from phimlx.history.records import Head
from phimlx.history.store import History
from phimlx.machine import doctor
from phimlx.machine.bandwidth import Bandwidth
from phimlx.machine.pass_cost import PassCost
from phimlx.transcription import TranscriptSegment
from tests.convert.test_fuse import SETTINGS, adapter_for
from tests.hub.cached import keep
from tests.locked_out import NOBODY
from tests.terminal.fake_phi import FakePhi, Said
from tests.training.folder import write_rows, write_tiny

LINES = {
    "chat": "chat",
    "generate": "generate hi",
    "extract": "extract note.txt --model tiny --schema {schema} -o out.jsonl",
    "transcribe": "transcribe sound.wav --model fake",
    "serve": "serve --check --port 0",
    "history list": "history list",
    "history show": "history show",
    "history search": "history search Hello",
    "history export": "history export",
    "history delete": "history delete last -y",
    "ui": "ui --no-open",
    "download": "download tiny",
    "list": "list",
    "remove": "remove you/model -y",
    "cache": "cache list",
    "convert": "convert tiny --mlx-path out",
    "train": "train --model tiny --data rows.jsonl --check",
    "distill": "distill --teacher tiny --student tiny --via text --data rows.jsonl --check",
    "prune": "prune --model tiny --layers 1 --mlx-path out",
    "fuse": "fuse --model tiny --adapter-path adapter --save-path out",
    "evaluate": "evaluate --model tiny --data rows.jsonl",
    "bench": "bench --model tiny --context 4 --batch-size 1 --tokens 2 --runs 1",
    "show": "show tiny",
    "config": "config",
    "config set": "config set temperature 1",
    "config unset": "config unset system",
    "config edit": "config edit",
    "persona list": "persona list",
    "persona show": "persona show brief",
    "persona edit": "persona edit brief",
    "completion": "completion bash",
    "doctor": "doctor",
    "demo": "demo",
}
"""Words of a command -> a line that it does at once."""

codecs.lookup("unicode_escape")

LINES = {name: line.replace("{schema}", '\'{"enum": ["a"]}\'') for name, line in LINES.items()}

USER = ("config", "data", "runtime", "cache", "hub")
"""Folders of this user, beside the working directory."""

EDITOR = "true"
BANDWIDTH = Bandwidth(1e11, "measured")
COST = PassCost(((1, 1.0), (32, 2.0)))

CLOSED = -1


def leaves() -> dict[str, click.Command]:
    """Every command that does something, those within commands too."""
    root = click.Context(cli)
    found: dict[str, click.Command] = {}
    for name in COMMANDS:
        command = cli.get_command(root, name)
        assert command is not None
        inner = command.commands if isinstance(command, click.Group) else {}
        if not isinstance(command, click.Group) or command.invoke_without_command:
            found[name] = command
        found |= {f"{name} {each}": command for each, command in inner.items()}
    return found


class Hearing(FakePhi):
    """Says and hears the same in everything."""

    takes_media = hears = True

    def __init__(self) -> None:
        super().__init__("Hello.", "Hello.")

    def transcribe(self, source: Any, on_open: Any, **options: Any) -> Iterator[TranscriptSegment]:
        on_open(1.0)
        yield TranscriptSegment(0.0, 1.0, "Hello.")


@dataclass(frozen=True)
class Ran:
    """What a run wrote, and its exit code."""

    code: int
    out: str
    err: str


class Place:
    """Folders of a user's own, and a working directory, in which every line ends well."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.work = home / "work"
        self.work.mkdir()
        write_tiny(self.work / "tiny")
        adapter_for(self.work / "tiny", self.work / "adapter", SETTINGS["lora"])
        write_rows(self.work / "rows.jsonl", 4)
        (self.work / "note.txt").write_text("It is a.")
        (self.work / "sound.wav").touch()

    @contextlib.contextmanager
    def lived_in(self) -> Iterator[pytest.MonkeyPatch]:
        """Let processes and this one take the folders for the user's; put in what lines need."""
        load = api.load

        def loaded(source: Any = None, *rest: Any, **more: Any) -> Any:
            return Hearing() if source in (None, "fake") else load(source, *rest, **more)

        def answered(*arguments: Any) -> Reply:
            return Reply(seed=0, content=Said("Hello."))

        def served(app: Any, settings: Any, opened: Any, on_start: Any) -> None:
            on_start()

        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(self.work)
            for name in ("config", "data", "runtime"):
                patch.setenv(f"PHIMLX_{name.upper()}_DIR", str(self.home / name))
            patch.setenv("XDG_CACHE_HOME", str(self.home / "cache"))
            patch.setenv("XDG_STATE_HOME", str(self.home / "data"))
            patch.setenv("HOME", str(self.home))
            patch.setenv("EDITOR", EDITOR)
            patch.setattr(constants, "HF_HUB_CACHE", str(self.home / "hub"))
            patch.setattr(constants, "HF_HUB_OFFLINE", True)
            patch.setattr(api, "load", loaded)
            patch.setattr(doctor, "_hub", lambda: doctor.Finding("Hub", "is silent"))
            patch.setattr("phimlx.server.run.serve", served)
            patch.setattr("phimlx.machine.bandwidth.memory_bandwidth", lambda: BANDWIDTH)
            patch.setattr(bench, "measure_pass_cost", lambda *arguments: COST)
            patch.setattr(bench, "first_token_seconds", lambda *arguments: 0.5)
            patch.setattr(bundled, "ask", answered)
            patch.setattr(bundled, "look_and_listen", answered)
            self._furnish()
            yield patch

    def _furnish(self) -> None:
        """Begin anew with what lines need, and without what they write."""
        for path in (*(self.home / name for name in USER), self.work / "out"):
            shutil.rmtree(path, ignore_errors=True)
        (self.work / "out.jsonl").unlink(missing_ok=True)
        for name in USER:
            (self.home / name).mkdir()
        keep(self.home / "hub", "you/model")
        personas = self.home / "config" / "personas"
        personas.mkdir()
        (personas / "brief.toml").write_text('system = "Be brief."\n')
        with History() as history:
            history.put(None, Head("nano"), [{"role": "user", "content": "Hello."}])

    def run(
        self,
        line: str,
        stdout: int | None = None,
        encoding: str = "utf-8",
        fault: AbstractContextManager[None] | None = None,
    ) -> Ran:
        """Run `phimlx LINE` in this process, with descriptors of its own.

        Args:
            stdout: a descriptor to write to; CLOSED for none, None for a file.
            encoding: that the locale names.
            fault: what is wrong while it runs.
        """
        streams = {name: self.home / f"std{name}" for name in ("in", "out", "err")}
        streams["in"].write_text("Hi\n")
        out = streams["out"] if stdout is None else stdout
        with (
            self.lived_in() as patch,
            descriptors(streams["in"], out, streams["err"], encoding),
            fault or contextlib.nullcontext(),
        ):
            patch.setattr("sys.argv", ["phimlx", *shlex.split(line)])
            patch.setattr("sys.path", [*sys.path])
            code = _exit_code()
        said = streams["out"].read_text("utf-8") if stdout is None else ""
        return Ran(code, said, streams["err"].read_text("utf-8"))


def _exit_code() -> int:
    try:
        main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    raise AssertionError("main returned")


@contextlib.contextmanager
def descriptors(
    stdin: Path, stdout: Path | int, stderr: Path, encoding: str = "utf-8"
) -> Iterator[None]:
    """Put files in place of the three streams, and all back afterwards."""
    sys.stdout.flush()
    sys.stderr.flush()
    streams = sys.stdin, sys.stdout, sys.stderr
    kept = [os.dup(number) for number in range(3)]
    creating = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    places = [
        os.open(stdin, os.O_RDONLY),
        stdout if isinstance(stdout, int) else os.open(stdout, creating, 0o666),
        os.open(stderr, creating, 0o666),
    ]
    for number, place in enumerate(places):
        if place == CLOSED:
            os.close(number)
            continue
        os.dup2(place, number)
        if place is not stdout:
            os.close(place)
    try:
        sys.stdin, sys.stdout, sys.stderr = (
            None if place == CLOSED else open(number, mode, encoding=encoding, closefd=False)  # noqa: SIM115
            for (number, place), mode in zip(enumerate(places), "rww", strict=True)
        )
        yield
    finally:
        sys.stdin, sys.stdout, sys.stderr = streams
        for number, before in enumerate(kept):
            os.dup2(before, number)
            os.close(before)


@contextlib.contextmanager
def as_nobody(home: Path) -> Iterator[None]:
    """Let all that lies in a folder be nobody's, who does what the block does where we are root."""
    if os.geteuid() != 0:
        yield
        return
    for path in (home, *home.rglob("*")):
        os.chown(path, NOBODY, NOBODY, follow_symlinks=False)
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@contextlib.contextmanager
def with_mode(home: Path, folder: Path, mode: int) -> Iterator[None]:
    """Take a folder, and all in it, from its owner as far as a mode says."""
    paths = [folder, *folder.rglob("*")]
    before = [path.stat().st_mode for path in paths]
    with as_nobody(home):
        for path in reversed(paths):
            path.chmod(mode)
        try:
            yield
        finally:
            for path, old in zip(paths, before, strict=True):
                with contextlib.suppress(FileNotFoundError):
                    path.chmod(old)


@contextlib.contextmanager
def in_place(folder: Path, put: Callable[[Path], object]) -> Iterator[None]:
    """Put something else in the place of a folder."""
    shutil.rmtree(folder)
    put(folder)
    try:
        yield
    finally:
        folder.unlink()


FAULTS: dict[str, Callable[[Path, Path], AbstractContextManager[None]]] = {
    "may not be read": lambda home, folder: with_mode(home, folder, 0),
    "may not be written": lambda home, folder: with_mode(home, folder, 0o555),
    "is a file": lambda home, folder: in_place(folder, Path.touch),
    "is a circle": lambda home, folder: in_place(folder, lambda path: path.symlink_to(path)),
}
"""What may be wrong with a folder within one that is all ours."""
