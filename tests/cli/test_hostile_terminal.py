"""Every command on a terminal, with names and texts that try to drive it.

A row brings hostile text in by one way; the run is compared with the same run on harmless text.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import tomlkit
from huggingface_hub import constants

from phimlx import api
from phimlx.checkpoint.array_file import write_array_file
from phimlx.cli.group import COMMANDS
from phimlx.errors import GenerationError
from phimlx.history.records import Head
from phimlx.history.store import History
from phimlx.hub.resolve import NANO
from phimlx.prompt.tools import ToolCall
from phimlx.transcription import TranscriptSegment
from tests.cli.in_process import SEQUENCE, Shown, run_on_terminal
from tests.cli.terminal import CTRL_C, CTRL_D, ENTER, TAB, UP, paste
from tests.hub.loopback_hub import COMMIT, serve_alone
from tests.remote.strange import hostile_server
from tests.terminal.fake_phi import FakePhi, Script

SHOWN = "Zq7"
HARMLESS = SHOWN
HOSTILE = (
    f"{SHOWN}\x1b]52;c;QUJD\x07\x1b]0;title\x1b\\\x1b]8;;x:y\x07\x1bP$q\x1b\\\x1b[7;7H\x1b[38;5;201m"
    "\x1b[?1049h\x1bc\x9b7;8H\x9d0;t\x9c\x90q\x9c\x85\x84\x07\x0e\x0f\x7f\x08BBB\rRRR\x0bV\x0cF"
    "\u202eevil\u202c\u2066i\u2069\u2028\u2029"
)
INVALID = "\udcff\udc9b"  # bytes of a name that are not UTF-8
NEWLINE = "\nHint: run this"

CONTROL = re.compile(
    "[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)  # written down again here, not taken from the gate
OURS = {f"\x1b[{code}" for code in ("A", "J", "2K", *(f"{n}m" for n in (0, 1, 2, 31, 33, 36)))} | {
    *("\r", "\t", "\x1b[0;36m")
}

OUR_COPY = re.compile(r"\x1b\]52;c;(?!QUJD\x07)[\w+/=]+\x07")
"""What /copy says to a terminal: what is copied depends on the text."""


@dataclass
class Row:
    """One way in.

    Attributes:
        make: given the text and an empty working directory, returns the arguments.
        kind: "name", with bytes that are no UTF-8; "json", with a lone surrogate; or "text".
        shown: whether something of it appears.
        ends_alike: whether hostile text ends with the same exit code.
        slow: whether a model computes.
        keys: as `run_on_terminal` takes them, made of the text.
    """

    make: Callable[[str, Path], list[str]]
    kind: str = "name"
    shown: bool = True
    ends_alike: bool = True
    slow: bool = False
    keys: Callable[[str, Path], list[tuple[str, str]]] = field(default=lambda text, folder: [])


def write(path: Path, value: Any) -> str:
    """Write JSON, or text."""
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return str(path)


def model_folder(name: str, folder: Path, **config: object) -> str:
    """The bundled model under a name, with other values in its config."""
    shutil.copytree(NANO, folder / name)
    path = folder / name / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return name


def odd_tensor(name: str, folder: Path) -> str:
    path = folder / model_folder("model", folder) / "model.safetensors"
    arrays: Any = mx.load(str(path))
    mx.save_safetensors(str(path), {**arrays, name: mx.zeros(2)})
    return "model"


def rows_of(text: str, folder: Path) -> str:
    lines = [{"prompt": text, "completion": text, text: 1} for _ in range(3)]
    return write(folder / "rows.jsonl", "\n".join(map(json.dumps, lines)))


def session(text: str, folder: Path, **changes: Any) -> str:
    value = {
        "format": "phimlx-chat",
        "version": 1,
        "model": text,
        "settings": {},
        "messages": [{"role": "system", "content": text}, {"role": "user", "content": text}],
    }
    return write(folder / "s.json", value | changes)


def cached(text: str, folder: Path) -> str:
    """A model in the cache whose name and config are hostile."""
    name = "you/" + text.replace("/", "")
    snapshot = folder / "hub" / f"models--{name.replace('/', '--')}" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    write(snapshot / "config.json", {"model_type": "phi3", "quantization": text})
    return name


def kept(text: str, folder: Path) -> str:
    """A prompt on disk that says it is of a hostile model."""
    key = {
        **dict.fromkeys(("model", "dtype", "rope", "made_with"), text),
        **dict.fromkeys(("adapter", "kv_bits", "row_adapter")),
        "table": 0,
    }
    metadata = {"format": "phimlx-prompt-cache", "version": "1", "tokens": "3", "media": "[]"}
    metadata |= {"key": json.dumps(key), "name": text, "path": text}
    name = f"{'0' * 16}-{'1' * 16}-3-{'2' * 16}.safetensors"
    prefixes = folder / "cache" / "prefixes"
    prefixes.mkdir(parents=True)
    arrays = {"tokens": mx.array([1, 2, 3])}
    forms = {"tokens": ((3,), mx.int32)}
    write_array_file(prefixes / name, forms, iter(arrays.items()), metadata)
    return ""


def preferred(text: str, folder: Path, **values: Any) -> str:
    """A file of settings with hostile values."""
    (folder / "config").mkdir()
    write(folder / "config" / "config.toml", tomlkit.dumps(values))
    return ""


def persona(text: str, folder: Path) -> str:
    """A persona that is hostile."""
    (folder / "config" / "personas").mkdir(parents=True)
    values = tomlkit.dumps({"system": text, "stop": [text]})
    return write(folder / "config" / "personas" / "p.toml", values)


def broken(text: str, folder: Path) -> str:
    """A file of settings that is no TOML."""
    (folder / "config").mkdir()
    return write(folder / "config" / "config.toml", f"{text} = {text}")


def said_before(text: str) -> str:
    """A conversation in the history in which everything is hostile."""
    call = {"name": text, "arguments": {text: text}}
    said = [
        {"role": "user", "content": text},
        {"role": "assistant", "content": text, "reasoning": text, "tool_calls": [call]},
        {"role": "tool", "content": text},
    ]
    with History() as history:
        history.delete_all()
        history.put(None, Head(text, None, text, {"stop": [text]}, [call]), said)
    return ""


def a_chat(
    *lines: tuple[str, str], unsent: tuple[str, str] | None = None
) -> Callable[[str, Path], list[tuple[str, str]]]:
    """Keys of a chat: pairs of what is typed at the prompt, {} the text, and what is shown then.

    `unsent` is such a pair, of a line that is thrown away.
    """

    def keys(text: str, folder: Path) -> list[tuple[str, str]]:
        pairs: list[tuple[str, str]] = []
        for typed, awaited in [*lines, *([unsent] if unsent else [])]:
            pairs += [("> ", typed.replace("{}", text)), (awaited, "")]
        if unsent:
            # At once, for the line and its prompt may be drawn again before it is thrown away.
            return [*pairs[:-1], (pairs[-1][0], CTRL_C + CTRL_D)]
        return [*pairs, ("> ", CTRL_D)]

    return keys


SKIP = "(empty to skip): "


def drop(text: str, folder: Path) -> list[str]:
    (folder / text).write_text("[]")
    return ["chat"]


ROWS: dict[str, dict[str, Row]] = {
    "chat": {
        "server": Row(
            lambda text, at: ["chat", "--server", hostile_server(text)],
            keys=lambda text, at: [("> ", f"hi{ENTER}"), (SKIP, ENTER), *a_chat()(text, at)],
        ),
        "refusal": Row(lambda text, at: ["chat", "--server", hostile_server(text, 400)]),
        "reply": Row(
            lambda text, at: ["chat"],
            keys=lambda text, at: [("> ", f"hi{ENTER}"), (SKIP, ENTER), *a_chat()(text, at)],
        ),
        "commands": Row(
            lambda text, at: ["chat"],
            keys=a_chat(
                *(
                    (paste(f"/{line}{{}}") + ENTER, awaited)
                    for line, awaited in {
                        "load ": "Error: ",
                        "image ": "Error: ",
                        "set ": "Error: ",
                        "tools ": "Error: ",
                        "save /nowhere/": "Error: ",
                        "help ": "Error: ",
                        "nope ": "Error: ",
                        "model ": "Error: ",
                        "persona ": "Error: ",
                        "drop ": "Error: ",
                        "copy ": "Error: ",
                        "code ": "Error: ",
                        "compact ": "Error: ",
                        "show ": "Error: ",
                        "system ": "System prompt set.",
                    }.items()
                ),
                (f"/system{ENTER}", SHOWN),
                unsent=(UP + UP, SHOWN),
            ),
        ),
        "copied": Row(
            lambda text, at: ["chat"],
            kind="json",
            keys=lambda text, at: [
                *(("> ", f"hi{ENTER}"), (SKIP, ENTER)),
                *a_chat((f"/copy{ENTER}", "Copied "))(text, at),
            ],
        ),
        "worn": Row(
            lambda text, at: [persona(text, at), "chat"][1:],
            kind="text",
            keys=a_chat((f"/persona p{ENTER}", "p goes on."), (f"/system{ENTER}", SHOWN)),
        ),
        "completion": Row(drop, keys=a_chat(unsent=(f"/load Zq{TAB}", SHOWN))),
        "session": Row(
            lambda text, at: ["chat", "--load", session(text, at)], kind="json", keys=a_chat()
        ),
        "role": Row(lambda text, at: ["chat", "--load", session(text, at, version=text)]),
        "name": Row(lambda text, at: ["chat", "--load", text]),
        "continued": Row(
            lambda text, at: [said_before(text), "chat", "--continue"][1:],
            kind="json",
            keys=a_chat(),
        ),
        "number": Row(lambda text, at: ["chat", "--continue", text]),
        "persona": Row(lambda text, at: ["chat", "--persona", text]),
        "kept": Row(
            lambda text, at: [said_before(text), "chat"][1:],
            kind="json",
            keys=a_chat((f"/history{ENTER}", SHOWN), (f"/load 1{ENTER}", "Loaded 3 messages")),
        ),
    },
    "history": {
        "list": Row(lambda text, at: [said_before(text), "history", "list"][1:], kind="json"),
        "show": Row(lambda text, at: [said_before(text), "history", "show"][1:], kind="json"),
        "json": Row(
            lambda text, at: [said_before(text), "history", "show", "--json"][1:], kind="json"
        ),
        "search": Row(
            lambda text, at: [said_before(text), "history", "search", SHOWN][1:], kind="json"
        ),
        "words": Row(lambda text, at: ["history", "search", text], shown=False),
        "export": Row(
            lambda text, at: [said_before(text), "history", "export", "--format", "md"][1:],
            kind="json",
        ),
        "file": Row(lambda text, at: [said_before("a"), "history", "export", "-o", text][1:]),
        "there": Row(
            lambda text, at: [
                *(said_before("a"), "history", "export", "-o", write(at / text, "x"))
            ][1:]
        ),
        "number": Row(lambda text, at: ["history", "show", text]),
        "deleted": Row(
            lambda text, at: [said_before(text), "history", "delete", "last"][1:],
            kind="json",
            keys=lambda text, at: [("[y/N]: ", f"y{ENTER}")],
        ),
    },
    "generate": {
        "reply": Row(lambda text, at: ["generate", "hi"]),
        "json": Row(lambda text, at: ["generate", "--json", "hi"]),
        "image": Row(lambda text, at: ["generate", "--image", text, "hi"]),
        "flag": Row(lambda text, at: ["generate", "--temp", text, "hi"]),
        "mode": Row(lambda text, at: ["generate", "--reasoning", text, "hi"]),
        "tools": Row(lambda text, at: ["generate", "--tools", text, "hi"]),
        "schema": Row(lambda text, at: ["generate", "--schema", f"{text} odd", "hi"]),
        "schema file": Row(lambda text, at: ["generate", "--schema", f"{text}.json", "hi"]),
        "grammar": Row(lambda text, at: ["generate", "--grammar", text, "hi"]),
        "debug": Row(lambda text, at: ["generate", "--debug", "--image", text, "hi"]),
        "adapters": Row(
            lambda text, at: ["generate", *(2 * ["--adapter-path", f"{text}=a"]), "hi"],
        ),
        "error": Row(lambda text, at: ["generate", "fail"]),
        "unexpected": Row(lambda text, at: ["generate", "crash"]),
        "server": Row(lambda text, at: ["generate", "--server", hostile_server(text), "hi"]),
        "server json": Row(
            lambda text, at: ["generate", "--server", hostile_server(text), "--json", "hi"]
        ),
        "refusal": Row(lambda text, at: ["generate", "--server", hostile_server(text, 400), "hi"]),
        "address": Row(lambda text, at: ["generate", "--server", f"http://u@{text}", "hi"]),
        "key": Row(lambda text, at: ["generate", "--server-key-file", text, "hi"]),
    },
    "extract": {
        "file": Row(
            lambda text, at: ["extract", "--model", "nano", text, "--schema", "a", "-o", "out"],
        ),
        "there": Row(
            lambda text, at: ["extract", "a", "--schema", "a", "-o", write(at / text, "x")],
        ),
        "schema": Row(lambda text, at: ["extract", "a", "--schema", f"{text} odd", "-o", "out"]),
    },
    "transcribe": {
        "speech": Row(lambda text, at: ["transcribe", write(at / text, "x")]),
        "two": Row(lambda text, at: ["transcribe", write(at / text, "x"), write(at / "b", "x")]),
        "json": Row(lambda text, at: ["transcribe", "--json", write(at / text, "x")]),
        "output": Row(lambda text, at: ["transcribe", write(at / "a", "x"), "-o", f"no{text}/o"]),
        "there": Row(
            lambda text, at: ["transcribe", write(at / "a", "x"), "-o", write(at / text, "x")]
        ),
        "written": Row(lambda text, at: ["transcribe", write(at / "a", "x"), "-o", text]),
        "absent": Row(lambda text, at: ["transcribe", text]),
        "question": Row(lambda text, at: ["transcribe", "a", "--translate-to", text], shown=False),
    },
    "download": {
        "name": Row(lambda text, at: ["download", text]),
        "folder": Row(lambda text, at: ["download", model_folder(text, at)]),
        "revision": Row(
            lambda text, at: ["download", "you/model", "--revision", text], shown=False
        ),
        "into": Row(lambda text, at: ["download", "you/model", "--local-dir", text]),
        "file": Row(lambda text, at: ["download", "you/odd"], ends_alike=False, shown=False),
    },
    "list": {
        "cache": Row(lambda text, at: [cached(text, at), "list"][1:]),
        "json": Row(lambda text, at: [cached(text, at), "list", "--json"][1:]),
    },
    "remove": {
        "name": Row(lambda text, at: ["remove", text]),
        "folder": Row(lambda text, at: ["remove", model_folder(text, at)]),
        "removed": Row(lambda text, at: ["remove", "-y", cached(text, at)], ends_alike=False),
    },
    "convert": {
        "out": Row(lambda text, at: ["convert", "nano", "--mlx-path", text]),
        "quantized": Row(lambda text, at: ["convert", "nano", "-q", "--mlx-path", text]),
        "there": Row(
            lambda text, at: ["convert", "nano", "--mlx-path", model_folder(text, at)],
        ),
        "model": Row(lambda text, at: ["convert", text, "--mlx-path", "out"]),
        "recipe": Row(lambda text, at: ["convert", "nano", "--mlx-path", "o", "--recipe", text]),
        "tensor": Row(
            lambda text, at: ["convert", odd_tensor(text, at), "--mlx-path", "out"], kind="text"
        ),
        "upload": Row(
            lambda text, at: ["convert", "--mlx-path", text, "--upload-repo", "me/model"],
        ),
        "type": Row(
            lambda text, at: [
                *("convert", model_folder("m", at, model_type=text), "--mlx-path", "out")
            ],
            kind="json",
        ),
    },
    "train": {
        "absent": Row(lambda text, at: ["train", "--model", "nano", "--data", text], kind="text"),
        "check": Row(
            lambda text, at: ["train", "--model", "nano", "--data", rows_of(text, at), "--check"],
            kind="json",
        ),
        "run": Row(
            lambda text, at: [
                *("train", "--model", "nano", "--data", rows_of(text, at), "--iters", "1"),
                *("--adapter-path", text),
            ],
            kind="text",
            slow=True,
        ),
        "config": Row(lambda text, at: ["train", "--config", text]),
        "setting": Row(
            lambda text, at: ["train", "--config", write(at / "c.yaml", json.dumps({text: text}))],
            kind="text",
        ),
        "no text": Row(
            lambda text, at: ["train", "--config", write(at / "c.yaml", json.dumps({text: 1}))],
            kind="json",
            shown=False,
        ),
        "row": Row(
            lambda text, at: [
                *("train", "--model", "nano"),
                *("--data", write(at / "r.jsonl", json.dumps({"messages": [{"role": text}]}))),
            ],
            kind="json",
        ),
        "resume": Row(lambda text, at: ["train", "--resume", "--adapter-path", text], kind="text"),
    },
    "distill": {
        "teacher": Row(
            lambda text, at: [
                *("distill", "--teacher", text, "--student", "nano", "--data", rows_of("a", at)),
            ],
            kind="text",
        ),
        "student": Row(
            lambda text, at: [
                *("distill", "--teacher", "nano", "--student", text, "--data", rows_of("a", at)),
            ],
            kind="text",
        ),
        "rows": Row(
            lambda text, at: [
                *("distill", "--teacher", "nano", "--student", "nano", "--via", "text"),
                *("--data", rows_of(text, at), "--check"),
            ],
            kind="json",
            shown=False,
        ),
    },
    "prune": {
        "model": Row(
            lambda text, at: ["prune", "--model", text, "--layers", "1", "--mlx-path", "o"]
        ),
        "path": Row(
            lambda text, at: ["prune", "--model", "nano", "--layers", "99", "--mlx-path", text],
            kind="text",
            shown=False,
        ),
    },
    "fuse": {
        "adapter": Row(
            lambda text, at: ["fuse", "--model", "nano", "--adapter-path", text, "--save-path", "o"]
        ),
        "model": Row(
            lambda text, at: ["fuse", "--model", text, "--adapter-path", "a", "--save-path", "o"]
        ),
        "export": Row(
            lambda text, at: [
                *("fuse", "--adapter-path", text, "--save-path", text, "--export", "peft")
            ]
        ),
    },
    "evaluate": {
        "data": Row(lambda text, at: ["evaluate", "--model", "nano", "--data", text]),
        "rows": Row(
            lambda text, at: ["evaluate", "--model", "nano", "--data", rows_of(text, at)],
            kind="json",
            slow=True,
        ),
        "mapping": Row(
            lambda text, at: [
                *("evaluate", "--model", "nano", "--data", rows_of("a", at)),
                *("--mapping", f"prompt={text}"),
            ]
        ),
        "model": Row(lambda text, at: ["evaluate", "--model", text, "--data", rows_of("a", at)]),
    },
    "show": {
        "folder": Row(lambda text, at: ["show", model_folder(text, at)]),
        "context": Row(lambda text, at: ["show", model_folder(text, at), "--context", "99999999"]),
        "name": Row(lambda text, at: ["show", text]),
        "json": Row(lambda text, at: ["show", "--json", model_folder(text, at)]),
        "type": Row(lambda text, at: ["show", model_folder("m", at, model_type=text)], kind="json"),
        "value": Row(
            lambda text, at: ["show", model_folder("m", at, hidden_size=text)], kind="json"
        ),
        "tensor": Row(lambda text, at: ["show", odd_tensor(text, at)], kind="text"),
    },
    "cache": {
        "action": Row(lambda text, at: ["cache", text]),
        "model": Row(lambda text, at: ["cache", "clear", "--model", text], shown=False),
        "kept": Row(lambda text, at: ["cache", "list", kept(text, at)][:2], kind="text"),
        "kept as json": Row(
            lambda text, at: ["cache", "list", "--json", kept(text, at)][:3], kind="text"
        ),
    },
    "bench": {
        "model": Row(lambda text, at: ["bench", "--model", text]),
        "adapter": Row(
            lambda text, at: ["bench", "--model", "nano", "--adapter-path", text],
        ),
    },
    "ui": {"model": Row(lambda text, at: ["ui", "--model", text], kind="text")},
    "serve": {
        "model": Row(lambda text, at: ["serve", "--model", text], kind="text"),
        "host": Row(lambda text, at: ["serve", "--host", text], kind="text"),
        "adapter": Row(
            lambda text, at: ["serve", "--model", "nano", "--adapter", f"a={text}"], kind="text"
        ),
        "key": Row(lambda text, at: ["serve", "--api-key-file", str(at / text)], kind="text"),
    },
    "config": {
        "set": Row(lambda text, at: ["config", "set", "system", text], kind="text"),
        "name": Row(lambda text, at: ["config", "set", text, "x"]),
        "alias": Row(lambda text, at: ["config", "set", f"alias.{text}", "x"], ends_alike=False),
        "unset": Row(lambda text, at: ["config", "unset", text]),
        "values": Row(
            lambda text, at: [preferred(text, at, alias={text: {"model": text}}), "config"][1:],
            kind="text",
        ),
        "json": Row(
            lambda text, at: [preferred(text, at, system=text), "config", "--json"][1:], kind="text"
        ),
        "key": Row(lambda text, at: [preferred(text, at, **{text: 1}), "config"][1:], kind="text"),
        "broken": Row(lambda text, at: [broken(text, at), "chat"][1:], kind="text", shown=False),
    },
    "persona": {
        "list": Row(lambda text, at: [persona(text, at), "persona", "list"][1:], kind="text"),
        "show": Row(lambda text, at: [persona(text, at), "persona", "show", "p"][1:], kind="text"),
        "json": Row(
            lambda text, at: [persona(text, at), "persona", "show", "p", "--json"][1:], kind="text"
        ),
        "name": Row(lambda text, at: ["persona", "show", text]),
        "edit": Row(lambda text, at: ["persona", "edit", f"/{text}"]),
    },
    "completion": {"shell": Row(lambda text, at: ["completion", text])},
    "doctor": {
        "found": Row(lambda text, at: ["doctor"], shown=False),
        "settings": Row(
            lambda text, at: [preferred(text, at, system=text), "doctor"][1:], kind="text"
        ),
    },
    "demo": {"argument": Row(lambda text, at: ["demo", text])},
}

CASES = [
    pytest.param(command, way, id=f"{command}-{way}", marks=pytest.mark.slow if row.slow else ())
    for command, ways in ROWS.items()
    for way, row in ways.items()
]


def test_every_command_has_rows() -> None:
    assert ROWS.keys() == COMMANDS.keys()


class HostilePhi(FakePhi):
    """A model that says, hears and is called what it was given."""

    takes_media = hears = True

    def __init__(self, text: str) -> None:
        super().__init__()
        self.name = self.text = text
        self.remarks = (text,)
        self.path = Path(text)

    def stream(self, prompt: Any, **options: Any) -> Any:
        asked = prompt[-1]["content"]
        if asked == "fail":
            raise GenerationError(self.text, self.text)
        if asked == "crash":
            raise ValueError(self.text)
        call = ToolCall(self.text, {self.text: self.text})
        self._scripts = [
            Script([("reasoning", self.text), *markdown(self.text)], [call], warnings=[self.text])
        ]
        return super().stream(prompt, **options)

    def transcribe(self, source: Any, **options: Any) -> Iterator[TranscriptSegment]:
        options["on_open"](2.0)
        yield TranscriptSegment(0.0, 1.0, self.text, "length")
        yield TranscriptSegment(1.0, 2.0, self.text)


def markdown(text: str) -> list[str]:
    """A reply with the text in every place of Markdown, raw, as entities and per cent."""
    entities = "".join(f"&#{ord(character)};" for character in text)
    quoted = "".join(f"%{byte:02x}" for byte in text.encode(errors="replace"))
    forms = [text, entities, f"<http://e/{quoted}>", f"<mailto:{quoted}@e.fr>"]
    forms += [f"[{entities}](http://e/{quoted} '{entities}')", f"![{entities}](x{quoted})"]
    places = ["{}", "# {}", "- {}", "1. {}", "> {}", "**{}**", "`{}`", "| {} |\n|---|\n| {} |"]
    places += ["```{}\n{}\n```", "    {}", "~~{}~~", "{}\n==="]
    return [f"{place.replace('{}', form)}\n\n" for place in places for form in forms]


@pytest.fixture
def shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str, Row, str], Shown]]:
    """Runs a row with a text, in a folder of its own."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr("phimlx.terminal.line.history_path", lambda: tmp_path / "state" / "history")
    real = api.load

    with serve_alone(monkeypatch, tmp_path / "elsewhere") as hub:

        def run(command: str, row: Row, text: str) -> Shown:
            folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
            folder.mkdir()
            state = tmp_path / "state"
            state.mkdir(exist_ok=True)
            (state / "history").write_text(f"\n# then\n+{HOSTILE if text != HARMLESS else text}\n")
            with monkeypatch.context() as patch:
                patch.chdir(folder)
                patch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub"))
                patch.setenv("PHIMLX_DATA_DIR", str(folder / "data"))
                patch.setenv("PHIMLX_CONFIG_DIR", str(folder / "config"))
                patch.setattr(
                    "phimlx.generation.prefix_store.prefixes_folder",
                    lambda: folder / "cache" / "prefixes",
                )
                if command == "doctor":
                    patch.setattr(constants, "HF_HUB_CACHE", str(folder / text / "hub"))
                hub.repos["you/model"] = {"config.json": b"{}", "model.safetensors": b"1"}
                hub.repos["you/odd"] = {f"model{text}.safetensors": b"1", "config.json": b"{}"}
                fake = command in ("chat", "generate", "transcribe")
                load = (lambda *given, **more: HostilePhi(text)) if fake else real
                patch.setattr(api, "load", load)
                return run_on_terminal(row.make(text, folder), patch, row.keys(text, folder))

        yield run


def sequences(raw: str) -> set[str]:
    """Escape sequences and control characters, without how far a cursor moves."""
    raw = OUR_COPY.sub("\x1b]52;c;…\x07", raw)
    found = set(SEQUENCE.findall(raw)) | set(CONTROL.findall(SEQUENCE.sub("", raw)))
    return {re.sub(r"(?<=\[)\d+(?=[ABCD]$)", "", each) for each in found}


def obeyed(hostile: Shown, harmless: Shown) -> set[str]:
    """What the terminal obeys in one run, and in the other does not."""
    return sequences(hostile.raw) - sequences(harmless.raw) - OURS


@pytest.mark.parametrize(("command", "way"), CASES)
def test_no_text_drives_the_terminal(
    command: str, way: str, shows: Callable[[str, Row, str], Shown]
) -> None:
    row = ROWS[command][way]
    text = HOSTILE + NEWLINE + {"name": INVALID, "json": "\ud800", "text": ""}[row.kind]
    harmless, hostile = shows(command, row, HARMLESS), shows(command, row, text)
    assert obeyed(hostile, harmless) == set()
    assert "\rRRR" not in hostile.raw
    assert "\x08BBB" not in hostile.raw
    if harmless.code:
        assert "\nHint: run this" not in hostile.text
    assert hostile.code == harmless.code or not row.ends_alike
    for shown in (harmless, hostile):
        assert SHOWN in shown.text or not row.shown
        assert "Traceback" not in shown.text or way == "debug"


@pytest.mark.parametrize("command", COMMANDS)
def test_no_argument_drives_the_terminal(
    command: str, shows: Callable[[str, Row, str], Shown]
) -> None:
    for make in (
        lambda text, at: [command, f"--{text}"],
        lambda text, at: [command, f"--help={text}"],
        lambda text, at: [f"{command}{text}"],
        lambda text, at: [f"--{text}", command],
    ):
        row, text = Row(make), HOSTILE + INVALID + NEWLINE
        harmless, hostile = shows("", row, HARMLESS), shows("", row, text)
        assert obeyed(hostile, harmless) == set()
        assert "\nHint: run this" not in hostile.text
        assert (hostile.code, harmless.code) == (2, 2)
        assert "Error: " in hostile.text


@pytest.mark.parametrize("width", [0, 1, 2, 7])
@pytest.mark.parametrize(
    ("command", "way"), [("list", "cache"), ("generate", "reply"), ("show", "folder")]
)
def test_narrow_terminals(
    command: str, way: str, width: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    if command == "generate":
        monkeypatch.setattr(api, "load", lambda *given, **more: HostilePhi(HARMLESS))
    arguments = ROWS[command][way].make(HARMLESS, tmp_path)
    shown = run_on_terminal(arguments, monkeypatch, width=width)
    assert shown.code == 0
    assert "Traceback" not in shown.text


@pytest.mark.parametrize("width", [3, 5])
def test_a_chat_on_a_narrow_terminal(
    width: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("phimlx.terminal.line.history_path", lambda: tmp_path / "history")
    monkeypatch.setattr(api, "load", lambda *given, **more: FakePhi("> a\n\n- b\n\n| c |\n|---|\n"))
    keys = [(">", f"hi{ENTER}"), ("b", ""), (">", CTRL_D)]
    shown = run_on_terminal(["chat"], monkeypatch, keys, width)
    assert (shown.code, "Traceback" in shown.text, "Error" in shown.text) == (0, False, False)


@pytest.mark.parametrize(("name", "value"), [("TERM", "dumb"), ("NO_COLOR", "1")])
def test_terminals_that_want_no_colours(
    name: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(api, "load", lambda *given, **more: HostilePhi(HARMLESS))
    for arguments, code in ((["generate", "hi"], 0), (["generate", "fail"], 1)):
        shown = run_on_terminal(arguments, monkeypatch, environment={name: value})
        assert shown.code == code
        assert SHOWN in shown.text
        assert not re.search(r"\x1b\[[\d;]*m", shown.raw)
