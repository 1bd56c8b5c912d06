"""`phimlx generate`: where a prompt comes from and where the answer goes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from phimlx.cli.generate import command
from phimlx.cli.group import cli
from phimlx.cli.stdin import NO_PROMPT
from phimlx.errors import GenerationError, ModelNotFoundError
from phimlx.generation.logprobs import MAX_TOP
from phimlx.prompt.tools import ToolCall
from tests.terminal.fake_phi import INTERRUPT, FakePhi, Script

USAGE = (
    "Usage: phimlx generate [OPTIONS] [PROMPT]\n"
    "Try 'phimlx generate --help' for help.\n\nError: {}\n"
)


class Generate:
    """Runs `phimlx generate` with a scripted model and tells what the model was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.phi = FakePhi(Script(["Hel", "lo."]))
        self.sources: list[Any] = []
        monkeypatch.setattr("phimlx.api.load", self._load)

    def _load(self, source: Any = None, adapter: Any = None, dtype: Any = None) -> FakePhi:
        self.sources.append(source)
        return self.phi

    def __call__(self, *arguments: str, piped: str | bytes | None = None) -> Result:
        return CliRunner().invoke(cli, ["generate", *arguments], input=piped, prog_name="phimlx")


@pytest.fixture
def generate(monkeypatch: pytest.MonkeyPatch) -> Generate:
    return Generate(monkeypatch)


@pytest.mark.parametrize(
    ("arguments", "piped", "prompt"),
    [
        (["--prompt", "Hi\\n"], None, "Hi\\n"),
        (["-p", "Sum up."], "long text\n", "long text\n\nSum up."),
        (["Sum up."], "long text\n", "long text\n\nSum up."),
        (["Hi"], "\n", "Hi"),
        (["-"], "Hi\nthere\r\n\n", "Hi\nthere"),
        (["--prompt", "-"], "Hi", "Hi"),
        ([], "\ufeffHi\n", "Hi"),
        (["--prompt", "Sum up:", "-"], "long text\n", "Sum up:\n\nlong text"),
        (["--prompt", "-", "Sum up."], "long text\n", "long text\n\nSum up."),
    ],
)
def test_where_a_prompt_comes_from(
    arguments: list[str], piped: str | None, prompt: str, generate: Generate
) -> None:
    result = generate(*arguments, piped=piped)
    assert (result.exit_code, result.stdout, result.stderr) == (0, "Hello.\n", "")
    assert generate.phi.prompts == [[{"role": "user", "content": prompt}]]
    assert generate.phi.options == [{"raw": False, "tools": None}]
    assert generate.sources == [None]


@pytest.mark.parametrize(
    ("arguments", "piped", "error"),
    [
        (["--prompt", ""], None, "The prompt is empty."),
        ([], "\n", "The prompt is empty."),
        (["--raw"], "", "The prompt is empty."),
        (["a", "-p", "b"], None, "The prompt is given twice: with --prompt and as PROMPT."),
        (["-", "-p", "-"], "x", "The prompt is given twice: with --prompt and as PROMPT."),
        (
            ["--raw", "--system", "x", "y"],
            None,
            "--raw uses no chat template, so it takes no --system, --tools, --prompt-form or "
            "--persona.",
        ),
        (
            ["--temp", "-1", "y"],
            None,
            "Invalid value for '--temp': -1.0 is not in the range x>=0.",
        ),
    ],
)
def test_wrong_usage(
    arguments: list[str], piped: str | None, error: str, generate: Generate
) -> None:
    result = generate(*arguments, piped=piped)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == USAGE.format(error)
    assert generate.sources == []


def test_without_a_prompt_on_a_terminal_the_usage_is_told(
    generate: Generate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("click.testing._NamedTextIOWrapper.isatty", lambda self: True)
    result = generate()
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == USAGE.format(NO_PROMPT)


@pytest.mark.parametrize(
    ("piped", "error"),
    [
        (b"ab\xff", "What was piped in is not UTF-8 text (byte 0xff at offset 2)."),
        (b"a\0b", "What was piped in is binary, not text."),
    ],
)
def test_what_is_piped_must_be_text(piped: bytes, error: str, generate: Generate) -> None:
    result = generate(piped=piped)
    hint = "Hint: Give a picture with --image -, a sound with --audio -.\n"
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", f"Error: {error}\n{hint}")


def test_raw_gives_the_prompt_as_it_is(generate: Generate) -> None:
    generate("--raw", piped="<|user|>Hi<|end|>\n")
    assert generate.phi.prompts == ["<|user|>Hi<|end|>\n"]
    assert generate.phi.options == [{"raw": True, "tools": None}]


def test_options_reach_the_model(generate: Generate, tmp_path: Path) -> None:
    tools = tmp_path / "tools.json"
    tools.write_text('[{"name": "search"}]')
    generate(
        *["--model", "nano", "--system", "Be brief.", "--tools", str(tools), "--max-tokens", "9"],
        *["--temp", "0", "--top-p", "0.9", "--top-k", "5", "--min-p", "0.1", "--seed", "3"],
        *["--repetition-penalty", "1.1", "--stop", "a", "--stop", "b", "--no-prompt-lookup", "Hi"],
    )
    assert generate.sources == ["nano"]
    assert generate.phi.prompts == [
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    ]
    assert generate.phi.options == [
        {
            "raw": False,
            "tools": [{"name": "search"}],
            "max_tokens": 9,
            "temperature": 0.0,
            "top_p": 0.9,
            "top_k": 5,
            "min_p": 0.1,
            "seed": 3,
            "repetition_penalty": 1.1,
            "stop": ("a", "b"),
            "prompt_lookup": False,
        }
    ]


def test_log_probabilities_go_with_json(generate: Generate) -> None:
    flag = next(each for each in command.params if each.name == "top_logprobs")
    assert isinstance(flag.type, click.IntRange)
    assert (flag.type.min, flag.type.max) == (0, MAX_TOP)
    result = generate("--top-logprobs", "2", "Hi")
    assert result.exit_code == 2
    assert result.stderr == USAGE.format("--top-logprobs goes with --json or --prompts.")
    generate("--json", "--top-logprobs", "2", "Hi")
    assert generate.phi.options == [
        {"raw": False, "tools": None, "logprobs": True, "top_logprobs": 2}
    ]


def test_bad_tools_are_said_before_a_model_is_loaded(generate: Generate, tmp_path: Path) -> None:
    result = generate("--tools", str(tmp_path / "none.json"), "Hi")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == f"Error: There is no file {tmp_path / 'none.json'}.\n"
    assert generate.sources == []


def test_json_is_one_object_and_nothing_else(generate: Generate) -> None:
    call = ToolCall("say", {"text": "é\u202e"})
    generate.phi = FakePhi(
        Script([("reasoning", "hm"), "An\x1bswer"], [call], warnings=["one odd call."])
    )
    result = generate("--json", "Hi")
    assert result.exit_code == 0
    assert json.loads(result.stdout) == {
        "text": "An\x1bswer",
        "reasoning": "hm",
        "tool_calls": [{"name": "say", "arguments": {"text": "é\u202e"}}],
        "finish_reason": "tool_calls",
        "model": "fake",
        "seed": 7,
        "warnings": ["one odd call."],
        "stats": {
            "prompt_tokens": 10,
            "cached_tokens": 0,
            "generated_tokens": 2,
            "forward_passes": 0,
            "drafted_tokens": 0,
            "accepted_tokens": 0,
            "prefill_seconds": 0.5,
            "generate_seconds": 0.5,
            "peak_memory": 0,
        },
    }
    assert "An\\u001bswer" in result.stdout
    assert result.stderr == "Warning: one odd call.\n"


def test_control_characters_and_reasoning_stay_off_a_pipe(generate: Generate) -> None:
    generate.phi = FakePhi(Script([("reasoning", "hm"), "red \x1b", "[31m \x9b2J", "\r!\n"]))
    result = generate("Hi")
    assert (result.stdout, result.stderr) == ("red [31m 2J!\n", "")


def test_verbose_tells_the_speed(generate: Generate) -> None:
    result = generate("-v", "Hi")
    assert result.stdout == "Hello.\n"
    assert result.stderr == "10 prompt tokens, 20.0/s · 2 tokens, 2.0/s · peak 0 bytes\n"


@pytest.mark.parametrize("as_json", [False, True])
def test_ctrl_c_prints_what_was_there(as_json: bool, generate: Generate) -> None:
    generate.phi = FakePhi(Script(["Once ", INTERRUPT, "upon", " a time"]))
    result = generate("Hi", *(["--json"] if as_json else []))
    assert (result.exit_code, result.stderr) == (130, "")
    if as_json:
        told = json.loads(result.stdout)
        assert (told["text"], told["finish_reason"]) == ("Once upon", "cancelled")
    else:
        assert result.stdout == "Once upon\n"


@pytest.mark.parametrize("arguments", [["Hi"], ["Hi", "--json"]])
def test_a_model_that_is_not_here_and_a_prompt_too_long(
    arguments: list[str], generate: Generate, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate.phi = FakePhi(GenerationError("The prompt has 200 tokens.", "Shorten it."))
    result = generate(*arguments)
    assert (result.exit_code, bool(result.stdout)) == (1, "--json" in arguments)
    assert result.stderr == "Error: The prompt has 200 tokens.\nHint: Shorten it.\n"

    def missing(source: Any, adapter: Any = None, dtype: Any = None) -> FakePhi:
        raise ModelNotFoundError("phi-4-mini is not here.", "phimlx download phi-4-mini")

    monkeypatch.setattr("phimlx.api.load", missing)
    result = generate(*arguments)
    assert (result.exit_code, bool(result.stdout)) == (1, "--json" in arguments)
    assert result.stderr == "Error: phi-4-mini is not here.\nHint: phimlx download phi-4-mini\n"


def test_bits_of_keys_and_values(generate: Generate) -> None:
    assert generate("Hi", "--kv-bits", "4").exit_code == 0
    assert generate.phi.options[0]["kv_bits"] == 4
    result = generate("Hi", "--kv-bits", "6")
    error = "Invalid value for '--kv-bits': '6' is not one of '8', '4'."
    assert (result.exit_code, result.stderr) == (2, USAGE.format(error))


def test_bits_that_the_model_cannot_have(generate: Generate) -> None:
    generate.phi = FakePhi(GenerationError("This model's heads have 80 channels.", "Leave it."))
    result = generate("Hi", "--kv-bits", "8")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "Error: This model's heads have 80 channels.\nHint: Leave it.\n"
