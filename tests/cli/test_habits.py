"""What hands type most in ollama, `llm` and mlx-lm, each with the line that does it here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cli.lines import Place
from tests.locked_out import open_folder

HABITS = {
    "ollama run llama3.2": "run --private",
    "ollama run llama3.2 'Hi'": "generate --private Hi",
    "ollama pull llama3.2": "pull tiny",
    "ollama list": "ls",
    "ollama rm llama3.2": "rm you/model -y",
    "ollama show llama3.2": "show tiny",
    "ollama serve": "serve --check --port 0",
    "llm 'Hi'": "generate Hi",
    "llm -m mlx-model 'Hi' -s 'Be brief.'": "generate --model fake 'Hi' --system 'Be brief.'",
    "cat notes.txt | llm -s 'Sum up'": "generate --system 'Sum up'",
    "llm -c 'And then?'": "generate --continue --model fake Then?",
    "llm chat -m mlx-model": "chat --model fake",
    "llm logs": "history list",
    "llm models": "models",
    "llm -m mlx-model 'a dog' --schema 'name, age int'": "generate Hi --schema 'name, age int'",
    "mlx_lm.generate --model M --prompt Hi --max-tokens 9 --temp 0.5":
        "generate --model fake --prompt Hi --max-tokens 9 --temp 0.5",
    "mlx_lm.chat --model M": "chat --model fake --max-tokens 9",
    "mlx_lm.convert --hf-path M --mlx-path out -q --q-bits 4 --q-group-size 32":
        "convert --hf-path tiny --mlx-path out -q --q-bits 4 --q-group-size 32",
    "mlx_lm.lora --model M --train --data D --iters 2":
        "lora --model tiny --train --data rows.jsonl --iters 2 --adapter-path out --check",
    "mlx_lm.fuse --model M --adapter-path A --save-path out":
        "fuse --model tiny --adapter-path adapter --save-path out",
    "mlx_lm.server --model M": "server --model tiny --check --port 0",
}  # fmt: skip
"""What is typed there -> what is typed here; names are those of the place where it is tried."""


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    with open_folder() as home:
        yield Place(home)


@pytest.mark.parametrize("theirs", HABITS)
def test_what_hands_type(theirs: str, place: Place) -> None:
    ran = place.run(HABITS[theirs])
    assert (ran.code, "Error" in ran.err) == (0, False), ran
    assert ran.out or "Hello." in ran.err
