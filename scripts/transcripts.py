#!/usr/bin/env python3
"""What a user sees, to be read: commands by subject, on terminals of 100 and 40 columns and piped.

    python scripts/transcripts.py OUT

Writes a file for each subject and width into the folder OUT: what stands on the terminal at the end
of each command, as an emulator shows it, and what goes to pipes. All run on the models that come
along, in folders of their own, without the network. The MCP server is one of the package `mcp`, the
microphone plays a clip.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import pty
import select
import shlex
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import time
from pathlib import Path

import pyte  # type: ignore[import-untyped]

sys.path.insert(0, str(Path(__file__).parents[1]))

from phimlx.cli.group import COMMANDS
from tests.cli.in_process import SEQUENCE
from tests.cli.terminal import CTRL_C, CTRL_D, ENTER

HOME = Path(__file__).parents[1]
PICTURE = HOME / "phimlx/assets/nano-multimodal/pictures/vision-00.png"
CLIP = HOME / "phimlx/assets/nano-multimodal/clips/speech-00.flac"
DEADLINE = 60.0  # seconds for the next thing that is waited for
HEIGHT = 40  # lines that a program is told of
PROMPT = "> "  # of a chat, at which a person types once nothing more comes
QUIET = 0.3  # seconds
LINES = 4000  # that are kept of what it writes
ROWS = '{"prompt": "Who are you?", "completion": "A small Phi."}\n' * 3 + '{"prompt": ""}\n' * 20

SERVER = """
import os
from mcp.server import MCPServer

server = MCPServer("calculator")

@server.tool()
def add(a: int, b: int) -> str:
    \"""Add two numbers.\"""
    if a == 13:
        os._exit(3)
    return str(a + b)

@server.tool()
def multiply(a: int, b: int) -> str:
    \"""Multiply two numbers.\"""
    raise ValueError("it is broken")

@server.tool()
def get_time(city: str) -> str:
    \"""Local time in a city\"""
    return "\\n".join(f"{hour}:00 in {city}" for hour in range(24))

server.run("stdio")
"""

NUMBERS = {name: {"type": "integer"} for name in "ab"}
TOOLS = [
    {
        "name": "add",
        "description": "Add two numbers",
        "parameters": {"type": "object", "properties": NUMBERS, "required": ["a", "b"]},
    }
]

Keys = list[tuple[str, str]]


def typed(*lines: str) -> Keys:
    """Lines that are typed one after the other, then Ctrl-D."""
    return [("> ", line + ENTER) for line in lines] + [("> ", CTRL_D)]


CHAT = "chat --model nano --temp 0 --private"
MCP = f"{CHAT} --mcp '{sys.executable} calculator.py'"
ADD = "What is 12 + 5?"

SUBJECTS: dict[str, list[tuple[str, Keys]]] = {
    "remembers": [
        ("config set alias.work nano", []),
        ("config set temprature 1", []),
        ("config", []),
        ("chat --model work --temp 0", typed("What is 3 + 4?", "/stats", "/show", "/history")),
        ("generate --model work --continue --temp 0 'And 5 + 6?'", []),
        ("history list", []),
        ("history search 3", []),
        ("history show", []),
        ("persona show brief", []),
        ("persona list", []),
    ],
    "found": [
        ("list", []),
        ("list --available", []),
        ("chta", []),
        ("help remove", []),
        ("show nano", []),
        ("download someone/else", []),
        ("chat --model nano", typed("/help", "/?")),
        *((f"{name} --help", []) for name in COMMANDS),
    ],
    "shapes": [
        ("generate --model nano --schema 'answer int' --temp 0 'What is 3 + 4?'", []),
        ("generate --model nano --regex '[0-9]+' --temp 0 'What is 3 + 4?'", []),
        ("generate --model nano --schema '{\"nope\": 1}' Hi", []),
        ("extract note.txt --model nano --schema 'sum int' -o out.jsonl", []),
    ],
    "tools": [
        (
            MCP,
            [
                ("> ", "/tools" + ENTER),
                ("> ", ADD + ENTER),
                ("[N]o", "y" + ENTER),
                ("> ", ADD + ENTER),
                ("[N]o", "n" + ENTER),
                ("> ", ADD + ENTER),
                ("[N]o", "a" + ENTER),
                ("> ", "What is 20 + 6?" + ENTER),
                ("26", ""),
                ("> ", "What time is it in Rome?" + ENTER),
                ("[N]o", "y" + ENTER),
                ("> ", "What is 3 times 4?" + ENTER),
                ("[N]o", "y" + ENTER),
                ("> ", "What is 13 + 5?" + ENTER),
                ("[N]o", ENTER),  # what the model tries once the server has ended
                ("> ", "/tools" + ENTER),
                ("> ", "/tools off" + ENTER),
                ("> ", "/show" + ENTER),
                ("> ", CTRL_D),
            ],
        ),
        (f"{MCP} --yes", typed(ADD, "What is 13 + 5?", ADD)),
        (f"{MCP} --yes --json", [("ends the chat.", ADD + ENTER), ("= 17", CTRL_D)]),
        (f"{CHAT} --mcp gone.json", []),
        (f"{CHAT} --mcp '{sys.executable} gone.py'", typed("Hi")),
        (f"{CHAT} --tools tools.json", [("> ", ADD + ENTER), ("skip): ", "17" + ENTER), *typed()]),
    ],
    "voice": [
        (
            "chat --model nano-multimodal --temp 0 --private",
            [
                ("> ", "/record" + ENTER),
                ("> ", "/record What number?" + ENTER),
                ("> ", "/speak" + ENTER),
                ("> ", "/speak loud" + ENTER),
                ("> ", "/speak on" + ENTER),
                ("> ", "What is 3 + 4?" + ENTER),
                ("> ", "/show" + ENTER),
                ("> ", CTRL_D),
            ],
        ),
        (CHAT, typed("/record")),
        (f"transcribe {CLIP} --model nano-multimodal", []),
        (f"transcribe {CLIP} --model nano-multimodal -o clip.srt", []),
        *(
            (f"transcribe --live --model nano-multimodal {more}", [("0:06", CTRL_C)])
            for more in ("", "--format srt", "-o live.vtt", "--json")
        ),
    ],
    "truth": [
        ("doctor", []),
        ("serve --check --port 0", []),
        ("serve --status", []),
        ("cache list", []),
        ("remove phi-4-mini -y", []),
        ("generate --model phi-4-mini hi", []),
        ("generate --model gone/gone hi", []),
        (f"generate --model nano-multimodal --image {PICTURE} --temp 0 'What shape is red?'", []),
        ("transcribe gone.wav --model nano-multimodal --json", []),
        ("train --model nano --data rows.jsonl --check", []),
        ("evaluate --model nano --data rows.jsonl", []),
        ("convert nano --mlx-path four -q", []),
        ("show nope --json", []),
    ],
}


def on_terminal(line: str, keys: Keys, width: int) -> str:
    """Return what a terminal shows after a command at which a person types `keys`."""
    screen = pyte.Screen(width, LINES)
    stream = pyte.ByteStream(screen)
    waiting, seen, shown = list(keys), 0, b""
    child, terminal = pty.fork()
    if not child:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # which a job in the background ignores
        os.execv(sys.executable, [sys.executable, "-m", "phimlx", *shlex.split(line)])
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", HEIGHT, width, 0, 0))
    deadline = time.monotonic() + DEADLINE
    while time.monotonic() < deadline:
        quiet = not select.select([terminal], [], [], QUIET)[0]
        try:
            data = b"" if quiet else os.read(terminal, 65536)
        except OSError:  # Linux's way to say that the other end is closed
            break
        stream.feed(data)
        shown += data
        text = SEQUENCE.sub("", shown.decode(errors="replace"))
        asks = quiet and screen.display[screen.cursor.y].rstrip() == PROMPT.rstrip()
        found = text.find(waiting[0][0], seen) if waiting else -1
        if asks if waiting and waiting[0][0] == PROMPT else found >= 0:
            awaited, key = waiting.pop(0)
            seen = len(text) if awaited == PROMPT else found + len(awaited)
            os.write(terminal, key.encode())
            deadline = time.monotonic() + DEADLINE
    os.close(terminal)  # hangs up where the deadline has passed
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    missing = [f"[never shown: {waiting[0][0]!r}]"] if waiting else []
    rows = "\n".join(row.rstrip() for row in screen.display).rstrip("\n")
    return "\n".join([rows, *missing, f"[exit code {code}]"])


def piped(line: str, keys: Keys) -> str:
    """Return what goes to pipes: stdout, then stderr."""
    said = "".join(text.rstrip(ENTER) + "\n" for _, text in keys if text != CTRL_D)
    done = subprocess.run(
        [sys.executable, "-m", "phimlx", *shlex.split(line)],
        input=said, capture_output=True, text=True, timeout=DEADLINE,
    )  # fmt: skip
    assert "\x1b" not in done.stdout + done.stderr
    return f"{done.stdout}[stderr]\n{done.stderr}[exit code {done.returncode}]"


def own_folders(home: Path) -> None:
    """Make folders of a user's own, and put in what the commands read."""
    for name in ("CONFIG", "DATA", "RUNTIME"):
        os.environ[f"PHIMLX_{name}_DIR"] = str(home / name.lower())
    os.environ |= {
        "PYTHONPATH": os.pathsep.join(map(str, (HOME, HOME / "tests/fake_device"))),
        "FAKE_MICROPHONE": str(CLIP),
        "TERM": "xterm-256color",
        "PROMPT_TOOLKIT_NO_CPR": "1",
        "HOME": str(home),
        "XDG_CACHE_HOME": str(home / "cache"),
        "XDG_STATE_HOME": str(home / "state"),
        "HF_HOME": str(home / "hub"),
        "HF_HUB_OFFLINE": "1",
    }
    personas = home / "config" / "personas"
    personas.mkdir(parents=True)
    (personas / "brief.toml").write_text(
        'system = "Be brief, and say nothing that is not asked."\n'
    )
    work = home / "work"
    work.mkdir()
    (work / "rows.jsonl").write_text(ROWS)
    (work / "calculator.py").write_text(SERVER)
    (work / "tools.json").write_text(json.dumps(TOOLS))
    (work / "note.txt").write_text("3 + 4 is 7.")
    os.chdir(work)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--subject", choices=SUBJECTS, action="append")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for subject in arguments.subject or SUBJECTS:
        for form in ("100", "40", "piped"):
            with tempfile.TemporaryDirectory() as folder:
                own_folders(Path(folder).resolve())
                with (out / f"{subject}-{form}.txt").open("w", encoding="utf-8") as file:
                    for line, keys in SUBJECTS[subject]:
                        if form == "piped":
                            if CTRL_C in dict(keys).values():
                                continue
                            shown = piped(line, keys)
                        else:
                            shown = on_terminal(line, keys, int(form))
                        print(f"$ phimlx {line}\n{shown}\n", file=file, flush=True)
                os.chdir(out)


if __name__ == "__main__":
    main()
