"""`generate` and `chat` with a server: the same words as without one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from phimlx import api
from phimlx.cli.group import cli
from phimlx.cli.remote import KEY_VARIABLE
from phimlx.remote.notes import Note, read_notes
from tests.reasoning_vision import reasoning_vision_folder
from tests.remote.strange import MODEL, listen, piece, stream_of, url_of
from tests.server.conftest import Say
from tests.server.running import Running, running
from tests.test_imports import python

NANO = ("--model", "nano", "--max-tokens", "12")
TOOLS = [{"description": "Weather.", "name": "weather", "parameters": {"type": "object"}}]


def run(*arguments: str, lines: str | None = None) -> Result:
    return CliRunner().invoke(cli, arguments, input=lines, prog_name="phimlx")


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is loaded here any more."""

    def load(*given: Any, **more: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(api, "load", load)


def is_loaded_here(result: Result) -> bool:
    return "a model was loaded" in result.stderr


def told(result: Result) -> Any:
    """What --json prints, without times."""
    value = json.loads(result.stdout)
    counts = ("prompt_tokens", "generated_tokens")
    return value | {"stats": {name: value["stats"][name] for name in counts}}


CASES: dict[str, list[str]] = {
    "greedy": ["--temp", "0", "Tell me a story."],
    "seeded": ["--temp", "1.4", "--seed", "5", "Tell me a story."],
    "system": ["--temp", "0", "--seed", "1", "--system", "Be brief.", "Hello"],
    "stop": ["--temp", "0", "--seed", "1", "--stop", "e", "Tell me a story."],
    "schema": ["--temp", "0", "--seed", "1", "--schema", "n bool", "Is it?"],
    "tools": ["--temp", "1.4", "--seed", "1", "--tools", "tools.json", "Weather?"],
}


@pytest.mark.parametrize("case", CASES)
def test_generate_says_the_same(
    note: Note, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tools.json").write_text(json.dumps(TOOLS))
    flags = ["generate", *NANO, *CASES[case], "--private"]
    here = run(*flags, "--json", "--no-server")
    plain = run(*flags, "--no-server")
    assert "Answered" not in here.stderr + plain.stderr
    monkeypatch.setattr(api, "load", None)
    for more in ([], ["--server", note.url]):
        there = run(*flags, *more, "--json")
        assert there.stderr == f"Answered by the server at {note.url}.\n"
        expected = told(here)
        if "--seed" not in flags:
            expected["seed"] = told(there)["seed"]
        assert told(there) == expected
        assert run(*flags, *more).stdout == plain.stdout


def test_a_chat_says_the_same(note: Note, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = "Hello\n/retry\n/set temp 1.2\n/set seed 4\nAnd then?\n/stats\n/compact\n"
    flags = ["chat", *NANO, "--temp", "0", "--private"]
    here = run(*flags, "--no-server", lines=lines)
    assert here.exit_code == 0
    monkeypatch.setattr(api, "load", None)
    for more in ([], ["--server", f"{note.url}/v1"]):
        there = run(*flags, *more, lines=lines)
        assert (there.exit_code, there.stdout) == (0, here.stdout)
        assert there.stderr.startswith(f"Answered by the server at {note.url}.\n")


def test_tool_calls_and_results(
    note: Note, say: Say, tmp_path: Path, alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tools.json").write_text(json.dumps(TOOLS))
    say('<|tool_call|>[{"name": "weather", "arguments": {"town": "Ulm"}}]<|/tool_call|>')
    found = run("generate", "--model", "nano", "--tools", "tools.json", "--private", "Weather?")
    assert found.stdout == '{"name": "weather", "arguments": {"town": "Ulm"}}\n'


HERE: dict[str, list[str]] = {
    "--dtype": ["--dtype", "float32"],
    "--kv-bits": ["--kv-bits", "8"],
    "--prompt-form": ["--prompt-form", "phi-2"],
    "--raw": ["--raw"],
    "--adapter-path": ["--adapter-path", "."],
    "--rope-scaling": ["--rope-scaling", "yarn:4"],
    "--top-logprobs": ["--top-logprobs", "2", "--json"],
    "--temp above 2": ["--temp", "3"],
    "--repetition-penalty above 10": ["--repetition-penalty", "11"],
}


@pytest.mark.parametrize("flag", HERE)
def test_what_a_server_cannot_do(note: Note, alone: None, flag: str) -> None:
    flags = ["generate", *NANO, "--private", *HERE[flag], "Hello"]
    found = run(*flags, "--server", note.url)
    assert found.exit_code == 2
    assert f"Error: --server goes without {flag}.\n" in found.stderr
    assert is_loaded_here(run(*flags))


def test_a_server_and_none(alone: None) -> None:
    found = run("generate", "--server", "http://127.0.0.1:1", "--no-server", "Hello")
    assert found.stderr.endswith("Error: --server and --no-server exclude each other.\n")


@pytest.mark.parametrize("model", ["nano-multimodal", "nothing-like-it"])
def test_a_server_with_another_model_is_left_alone(note: Note, alone: None, model: str) -> None:
    found = run("generate", "--model", model, "--private", "Hello")
    assert is_loaded_here(found)
    assert "Answered" not in found.stderr


def test_a_folder_that_the_server_does_not_hold(note: Note, tmp_path: Path, alone: None) -> None:
    found = run("generate", "--model", str(tmp_path), "--server", note.url, "Hello")
    assert found.exit_code == 1
    assert found.stderr == (
        f"Error: {tmp_path} is a folder, and the server at {note.url} does not hold what is in "
        "it.\nHint: Give a model's name there, or load it here: --no-server.\n"
    )


def test_a_folder_that_a_server_holds(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the mode in which it reasons, which its prompts tell."""
    monkeypatch.setenv("PHIMLX_RUNTIME_DIR", str(tmp_path / "run"))
    (tmp_path / "mine").mkdir()
    folder = str(reasoning_vision_folder(data, tmp_path / "mine"))
    flags = [
        "generate",
        "--model",
        folder,
        "-m",
        "4",
        "--seed",
        "1",
        "--private",
        "--json",
        "What?",
    ]
    modes = ("auto", "on", "off")
    here = [told(run(*flags, "--reasoning", mode)) for mode in modes]
    assert len({each["stats"]["prompt_tokens"] for each in here}) > 1
    with running(model=folder) as server:
        Note(server.url, os.getpid(), server.app.secret).write()
        monkeypatch.setattr(api, "load", None)
        for more in ([], ["--server", server.url]):
            there = [told(run(*flags, *more, "--reasoning", mode)) for mode in modes]
            assert there == here


def test_without_a_model_it_is_what_the_server_holds(alone: None) -> None:
    with running(model="nano") as server:
        found = run("generate", "--server", server.url, "--private", "-m", "3", "--json", "Hello")
        assert json.loads(found.stdout)["model"] == "nano"


def test_keys(tmp_path: Path, alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "key").write_text("k\n")
    (tmp_path / "two").write_text("a\nb\n")
    with running("k", model="nano") as server:
        flags = ["generate", *NANO, "--server", server.url, "--private", "Hello"]
        refused = run(*flags)
        assert (refused.exit_code, refused.stdout) == (1, "")
        assert refused.stderr == (
            f"Error: The server at {server.url} wants a key, and this is not it.\n"
            "Hint: Give it with --server-key-file FILE, or in PHIMLX_API_KEY.\n"
        )
        assert run(*flags, "--server-key-file", str(tmp_path / "key")).exit_code == 0
        broken = run(*flags, "--server-key-file", str(tmp_path / "two"))
        assert f"Error: {tmp_path / 'two'} holds no key.\n" in broken.stderr
        monkeypatch.setenv(KEY_VARIABLE, "k")
        assert run(*flags).exit_code == 0


def test_a_server_that_dies_in_the_middle(alone: None) -> None:
    said = {"/v1/chat/completions": stream_of(piece(), end=b"")}
    model = json.dumps(MODEL).encode()
    with listen(lambda path: (200, said.get(path, model))) as server:
        url = url_of(server)
        found = run("generate", "--server", url, "--model", "nano", "--private", "Hello")
        server.shutdown()
    assert (found.exit_code, found.stdout) == (1, "Hi")
    assert found.stderr == (
        f"Answered by the server at {url}.\n"
        f"Error: The server at {url} ended in the middle of its answer.\n"
    )


def test_a_server_that_runs_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHIMLX_RUNTIME_DIR", str(tmp_path))
    seen: list[Note] = []

    def serve(app: Any, settings: Any, opened: Any, on_start: Callable[[], object]) -> None:
        assert read_notes() == []
        on_start()
        [note] = read_notes()
        assert note.secret == app.secret
        seen.append(note)
        raise KeyboardInterrupt

    monkeypatch.setattr("phimlx.terminal.log.show_log", lambda *given: None)
    monkeypatch.setattr("phimlx.server.run.serve", serve)
    run("serve", "--port", "0", "--host", "0.0.0.0", "--no-auth")
    assert seen[0].url.startswith("http://127.0.0.1:")
    assert list((tmp_path / "servers").iterdir()) == []


def test_a_server_that_cannot_be_noted_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PHIMLX_RUNTIME_DIR", str(tmp_path / "file"))
    monkeypatch.setattr("phimlx.terminal.log.show_log", lambda *given: None)
    monkeypatch.setattr("phimlx.server.run.serve", lambda *given: given[-1]())
    found = run("serve", "--port", "0")
    assert found.exit_code == 0
    assert "Warning: chat and generate do not find this server: not a directory.\n" in found.stderr


def test_a_model_on_a_server_loads_no_mlx_here(note: Note) -> None:
    done = python(
        *("-X", "importtime", "-m", "phimlx", "generate", *NANO, "--private", "Hello"),
    )
    assert f"Answered by the server at {note.url}." in done.stderr
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "httpx2" in loaded
    assert not loaded & {"mlx.core", "tokenizers", "jinja2", "transformers"}


def test_nothing_is_asked_where_there_is_no_server(
    server: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PHIMLX_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr("phimlx.hub.content_hash.Contents", None)
    found = run("generate", *NANO, "--private", "Hello")
    assert (found.exit_code, found.stderr) == (0, "")
