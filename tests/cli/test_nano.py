"""The commands end to end on the model that comes along, against the Python API."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner

from phimlx import api
from phimlx.cli.group import cli

if TYPE_CHECKING:
    from phimlx.api import Phi

QUESTION = "What is the capital of France?"
TOOLS = [
    {
        "name": "get_time",
        "description": "Local time in a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    }
]


@pytest.fixture(scope="module")
def phi() -> Phi:
    return api.load("nano")


def test_generate_says_what_the_api_says(phi: Phi) -> None:
    expected = phi.generate(QUESTION, temperature=0)
    result = CliRunner().invoke(cli, ["generate", "--model", "nano", "--temp", "0", QUESTION])
    assert (result.exit_code, result.stdout, result.stderr) == (0, f"{expected.text}\n", "")
    assert expected.text


def test_generate_json_counts_what_the_api_counts(phi: Phi) -> None:
    options = {"temperature": 1.0, "seed": 5, "max_tokens": 3}
    expected = phi.generate("Spell the word house.", **options)
    result = CliRunner().invoke(
        cli,
        ["generate", "--model", "nano", "--json", "--temp=1", "--seed=5", "--max-tokens=3"],
        input="Spell the word house.\n",
    )
    told = json.loads(result.stdout)
    assert (told["text"], told["finish_reason"]) == (expected.text, expected.finish_reason)
    assert (told["model"], told["seed"]) == ("nano", 5)
    assert told["stats"]["prompt_tokens"] == expected.stats.prompt_tokens
    assert told["stats"]["generated_tokens"] == len(expected.tokens)


def test_a_tool_call_is_a_line_of_json(phi: Phi, tmp_path: Path) -> None:
    file = tmp_path / "tools.json"
    file.write_text(json.dumps(TOOLS))
    question = "How late is it in Paris?"
    (call,) = phi.generate(question, tools=TOOLS, temperature=0).tool_calls
    result = CliRunner().invoke(
        cli, ["generate", "--model", "nano", "--temp", "0", "--tools", str(file), question]
    )
    assert json.loads(result.stdout) == {"name": call.name, "arguments": call.arguments}
    assert call.name == "get_time"


def test_turns_of_a_chat_are_what_the_api_says_to_the_messages(phi: Phi) -> None:
    questions = ["What is 3 + 4?", "Translate egg to Spanish.", QUESTION]
    messages: list[dict[str, str]] = []
    for question in questions:
        messages.append({"role": "user", "content": question})
        answer = phi.generate(messages, temperature=0).text
        messages.append({"role": "assistant", "content": answer})
    result = CliRunner().invoke(
        cli, ["chat", "--model", "nano", "--temp", "0"], input="\n".join(questions)
    )
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == "".join(f"{message['content']}\n" for message in messages[1::2])


def test_a_prompt_longer_than_the_context_is_refused_with_the_numbers(phi: Phi) -> None:
    text = "long words " * 1000
    count = len(phi.encode(text))
    result = CliRunner().invoke(cli, ["generate", "--model", "nano", text])
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == (
        f"Error: The prompt has {count:,} tokens, but nano holds 1,024 for prompt and reply "
        "together.\nHint: Shorten the prompt.\n"
    )


def test_generation_imports_neither_transformers_nor_mlx_lm() -> None:
    done = subprocess.run(
        [
            *[sys.executable, "-X", "importtime", "-m", "phimlx", "generate", "--model", "nano"],
            *["--temp", "0", QUESTION],
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0
    imported = {
        line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()
    }
    assert {"mlx", "tokenizers"} <= imported
    assert not imported & {"transformers", "mlx_lm", "torch", "rich", "prompt_toolkit", "tqdm"}


def test_a_folder_that_only_shares_an_alias_does_not_name_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from phimlx.cli.conversations import model_name

    monkeypatch.chdir(tmp_path)
    (tmp_path / "nano").mkdir()
    assert model_name("nano") == "nano"
    (tmp_path / "nano" / "config.json").write_text("{}")
    assert model_name("nano") == str(tmp_path / "nano")


def test_kv_bits_hold_for_a_file_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int | None] = []
    make = api.Phi.request

    def request(self: Phi, *given: Any) -> Any:
        made = make(self, *given)
        asked.append(made.kv_bits)
        return made

    monkeypatch.setattr(api.Phi, "request", request)
    source, target = tmp_path / "q.jsonl", tmp_path / "a.jsonl"
    source.write_text(f"{json.dumps(QUESTION)}\n")
    arguments = ["generate", "--model", "nano", "--kv-bits", "8", "--prompts", str(source)]
    result = CliRunner().invoke(cli, [*arguments, "--output", str(target)])
    assert (result.exit_code, asked) == (0, [8])


def test_generate_answers_a_file(phi: Phi, tmp_path: Path) -> None:
    source, target = tmp_path / "q.jsonl", tmp_path / "a.jsonl"
    source.write_text(f'{json.dumps(QUESTION)}\n{{"prompt": "What is 3 + 4?", "id": "sum"}}\n')
    arguments = ["generate", "--model", "nano", "--temp", "0", "--prompts", str(source)]
    for wrong in ([], ["--output", str(target), "Hi"], ["--output", str(target), "--prompt", "Hi"]):
        result = CliRunner().invoke(cli, [*arguments, *wrong])
        assert result.exit_code == 2, wrong
        assert not target.exists()
    result = CliRunner().invoke(cli, [*arguments, "--output", str(target)])
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == f"2 replies are in {target}.\n"
    rows = [json.loads(line) for line in target.read_text().splitlines()]
    expected = phi.generate(QUESTION, temperature=0).text
    assert [(row["line"], row.get("id"), row["text"]) for row in rows] == [
        (1, None, expected),
        (2, "sum", "7"),
    ]
    target.unlink()
    source.write_text(f"{json.dumps(QUESTION)}\nnonsense\n")
    result = CliRunner().invoke(cli, [*arguments, "--json", "--output", str(target)])
    assert result.exit_code == 1
    told = json.loads(result.stdout)
    error = told.pop("error")
    assert error["message"] == "1 of 2 lines could not be answered: 2."
    assert told == {"output": str(target), "answered": 1, "failed": told["failed"]}
    assert list(told["failed"]) == ["2"]
    assert "Error: 1 of 2 lines could not be answered: 2." in result.stderr
