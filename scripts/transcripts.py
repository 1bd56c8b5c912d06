#!/usr/bin/env python3
"""What a user sees, to be read: commands by subject, on terminals of 100 and 40 columns and piped.

    python scripts/transcripts.py OUT

Writes a file for each subject and width into the folder OUT. All run on the models that come along,
in folders of their own, without the network.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from phimlx.cli.group import COMMANDS
from tests.cli.in_process import run_on_terminal
from tests.cli.terminal import CTRL_D, ENTER

HOME = Path(__file__).parents[1]
PICTURE = HOME / "phimlx/assets/nano-multimodal/pictures/vision-00.png"
ROWS = '{"prompt": "Who are you?", "completion": "A small Phi."}\n' * 3 + '{"prompt": ""}\n' * 20

Keys = list[tuple[str, str]]


def typed(*lines: str) -> Keys:
    """Lines that are typed one after the other, then Ctrl-D."""
    return [("> ", line + ENTER) for line in lines] + [("> ", CTRL_D)]


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
    """Return the lines of a terminal after a command, as they stand at its end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "")
        patch.delenv("COLUMNS")
        shown = run_on_terminal(shlex.split(line), patch, keys, width)
    rows = [row.rpartition("\r")[2].rstrip() for row in shown.text.split("\n")]
    return "\n".join([*rows, f"[exit code {shown.code}]"])


def piped(line: str, keys: Keys) -> str:
    """Return what goes to pipes: stdout, then stderr."""
    said = "".join(text.rstrip(ENTER) + "\n" for _, text in keys if text != CTRL_D)
    done = subprocess.run(
        [sys.executable, "-m", "phimlx", *shlex.split(line)],
        input=said, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(HOME)},
    )  # fmt: skip
    return f"{done.stdout}[stderr]\n{done.stderr}[exit code {done.returncode}]"


def own_folders(home: Path) -> None:
    """Make folders of a user's own, and put in what the commands read."""
    for name in ("CONFIG", "DATA", "RUNTIME"):
        os.environ[f"PHIMLX_{name}_DIR"] = str(home / name.lower())
    os.environ |= {
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
                            shown = piped(line, keys)
                        else:
                            shown = on_terminal(line, keys, int(form))
                        print(f"$ phimlx {line}\n{shown}\n", file=file, flush=True)
                os.chdir(out)


if __name__ == "__main__":
    main()
