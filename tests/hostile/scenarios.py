"""Commands that write, each with what it needs and what is left when nobody disturbs it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from click.testing import CliRunner, Result

import convert.plan
from convert.export import gguf
from phimlx import api
from phimlx.cli.group import cli
from phimlx.errors import PhimlxError
from phimlx.terminal.conversation import Conversation
from phimlx.transcription import TranscriptSegment
from tests.convert.test_fuse import SETTINGS, adapter_for
from tests.hub.loopback_hub import Hub, serve_alone
from tests.terminal.fake_phi import FakePhi
from tests.training.folder import write_rows, write_tiny

REPO = "someone/tune"
TIMES = ("seconds", "left", "tokens_per_second", "peak_memory")
TRAINED: tuple[str, ...] = ("--iters", "4", "--batch-size", "2", "--num-layers", "1", "--rank", "2")
TRAINED += ("--save-every", "2", "--steps-per-eval", "2", "--learning-rate", "0.01", "--keep", "1")


@dataclass(frozen=True)
class Inputs:
    """What commands read: made once, and never written to.

    Attributes:
        work: the folder that they write into.
    """

    model: Path
    adapter: Path
    rows: Path
    hub: Hub
    work: Path


@contextmanager
def prepared(folder: Path) -> Iterator[Inputs]:
    """Make all inputs, and keep a Hub open while the block runs."""
    model = write_tiny(folder / "model")
    adapter = adapter_for(model, folder / "adapter", SETTINGS["lora"])
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(convert.plan, "JOURNAL_BYTES", 100_000)
        patch.setattr(gguf, "JOURNAL_BYTES", 100_000)
        patch.setattr(api, "load", _load(api.load))
        work = folder / "work"
        hub = stack.enter_context(serve_alone(patch, work / "hub"))
        hub.repos[REPO] = {
            file.name: file.read_bytes() for file in sorted(model.iterdir()) if file.is_file()
        }
        (folder / "a.wav").touch()
        yield Inputs(model, adapter, write_rows(folder / "rows.jsonl", 6), hub, work)


class Hearing(FakePhi):
    """Hears the same in everything."""

    takes_media = hears = True

    def transcribe(self, source: Any, on_open: Any, **options: Any) -> Iterator[TranscriptSegment]:
        on_open(1.0)
        yield TranscriptSegment(0.0, 1.0, "Hello.")


def _load(load: Callable[..., Any]) -> Callable[..., Any]:
    """Load what hears where it is asked for by the name that the commands here use."""

    def loaded(source: Any = None, *rest: Any, **more: Any) -> Any:
        return Hearing() if source == "hearing" else load(source, *rest, **more)

    return loaded


@dataclass(frozen=True)
class Scenario:
    """A command, and the command that goes on where it was killed."""

    run: Callable[[Inputs], Result]
    again: Callable[[Inputs], Result]


def command(*arguments: str) -> Callable[[Inputs], Result]:
    """Call the command line; `{name}` in an argument is a path of the inputs."""

    def run(inputs: Inputs) -> Result:
        filled = [part.format(folder=inputs.work.parent, **inputs.__dict__) for part in arguments]
        return CliRunner().invoke(cli, filled, prog_name="phimlx")

    return run


def _resumed(inputs: Inputs) -> Result:
    """Go on with a run where there is one; else begin it."""
    if (inputs.work / "out" / "run.json").exists():
        return command("train", "--resume", "--adapter-path", "{work}/out")(inputs)
    return _train(inputs)


def _saved(inputs: Inputs) -> Result:
    """Save a session, as /save does."""
    talk = Conversation("nano")
    said = b""
    try:
        talk.save(inputs.work / "s.json", replace=True)
    except PhimlxError as error:
        said = f"Error: {error}\n".encode()
    return Result(CliRunner(), b"", said, said, None, 1 if said else 0, None)


def _same(*arguments: str) -> Scenario:
    return Scenario(command(*arguments), command(*arguments))


CONVERT = ("convert", "{model}", "--mlx-path", "{work}/out")
FUSE = ("fuse", "--adapter-path", "{adapter}", "--save-path", "{work}/out")
_train = command(
    "train", "--model", "{model}", "--data", "{rows}", "--adapter-path", "{work}/out", *TRAINED
)
SCENARIOS = {
    "convert": _same(*CONVERT, "-q", "--q-group-size", "32"),
    "convert from the Hub": _same("convert", REPO, *CONVERT[2:]),
    "export hf": _same(*CONVERT, "--export", "hf"),
    "export gguf": _same(*CONVERT[:-1], "{work}/out.gguf", "--export", "gguf-q8_0"),
    "fuse": _same(*FUSE, "--model", "{model}"),
    "export peft": _same(*FUSE, "--export", "peft"),
    "export mlx-lm": _same(*FUSE, "--export", "mlx-lm"),
    "train": Scenario(_train, _resumed),
    "download": _same("download", REPO),
    "download to a folder": _same("download", REPO, "--local-dir", "{work}/mine"),
    "save a session": Scenario(_saved, _saved),
    "transcribe": _same(
        *("transcribe", "{folder}/a.wav", "--model", "hearing"),
        *("--overwrite", "-o", "{work}/out.txt"),
    ),
}


def emptied(inputs: Inputs) -> None:
    """Begin anew with an empty folder, which a session stands in that is to be replaced."""
    shutil.rmtree(inputs.work, ignore_errors=True)
    inputs.work.mkdir()


def contents(folder: Path) -> dict[str, Any]:
    """Everything in a folder, by path: bytes, targets of links, and nothing that a clock tells."""
    return {str(path.relative_to(folder)): _content(path) for path in sorted(folder.rglob("*"))}


def _content(path: Path) -> Any:
    if path.is_symlink():
        return path.readlink()
    if path.is_dir():
        return None
    if path.suffix == ".safetensors":
        return _arrays(path)
    if path.name == "log.jsonl":
        return [_timeless(json.loads(line)) for line in path.read_text().splitlines()]
    if path.name == "manifest.json":
        manifest = json.loads(path.read_text())
        state = _timeless(manifest["state"])
        return {**manifest, "state": {**state, "window": _timeless(state["window"])}}
    return path.read_bytes()


def _timeless(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in TIMES}


def _arrays(path: Path) -> Any:
    """The bytes; of what MLX wrote, whose header names tensors in no fixed order, the numbers."""
    try:
        arrays = mx.load(str(path))
    except RuntimeError:  # half of one
        return path.read_bytes()
    assert isinstance(arrays, dict)
    return {name: (str(each.dtype), each.tolist()) for name, each in sorted(arrays.items())}
