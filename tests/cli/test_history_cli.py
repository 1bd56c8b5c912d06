"""`phimlx history`, and chats and prompts that it keeps."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from PIL import Image

from phimlx.cli.group import cli
from phimlx.errors import GenerationError
from phimlx.history.records import Head
from phimlx.history.store import History
from phimlx.hub.resolve import NANO
from phimlx.terminal.conversation import Conversation
from phimlx.training.data.examples import load_data
from phimlx.training.data.loss_mask import RowEncoder
from tests.terminal.fake_phi import INTERRUPT, FakePhi, Script

HEAD = Head("nano")
USER = {"role": "user", "content": "What is MLX?"}
ANSWER = {"role": "assistant", "content": "An array framework."}

Run = Callable[..., Result]


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PHIMLX_DATA_DIR", str(tmp_path / "kept"))
    monkeypatch.setattr("phimlx.cli.history.when", lambda seconds: "2030-01-02 03:04")
    return tmp_path / "kept"


@pytest.fixture
def run(data: Path) -> Run:
    return lambda *arguments, input=None: CliRunner().invoke(cli, arguments, input=input)


class Loaded:
    """Runs a command with a scripted model, and remembers what was loaded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
        self.phi = FakePhi()
        self.sources: list[Any] = []
        self._run = run
        monkeypatch.setattr("phimlx.api.load", self._load)

    def _load(self, source: Any = None, adapter: Any = None, dtype: Any = None) -> FakePhi:
        self.sources.append((source, adapter))
        return self.phi

    def __call__(self, replies: list[Any], *arguments: str, input: str | None = None) -> Result:
        self.phi = FakePhi(*replies)
        return self._run(*arguments, input=input)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch, run: Run) -> Loaded:
    return Loaded(monkeypatch, run)


def kept(id: int = 1) -> list[tuple[str, str]]:
    with History() as history:
        return [(each["role"], each["content"]) for each in history.read(id).messages]


def test_list_show_search(run: Run) -> None:
    result = run("history", "list")
    assert (result.exit_code, result.stdout) == (0, "There is no conversation yet.\n")
    with History() as history:
        history.put(None, Head("nano", system="Be brief."), [USER, ANSWER])
        history.put(None, HEAD, [{"role": "user", "content": "Hello"}])
    assert run("history", "list").stdout == (
        "id   conversation   model   messages   last\n"
        "───────────────────────────────────────────────────────\n"
        " 2   Hello          nano           1   2030-01-02 03:04\n"
        " 1   What is MLX?   nano           2   2030-01-02 03:04\n"
    )
    assert run("history", "show", "1").stdout == (
        "1  What is MLX?\nnano · 2 messages · 2030-01-02 03:04\n"
        "\nSystem prompt: Be brief.\n\n» What is MLX?\n\nAn array framework.\n"
    )
    assert run("history", "show").stdout.startswith("2  Hello\n")
    assert run("history", "search", "frame", "array").stdout.splitlines()[2] == (
        " 1   What is MLX?   assistant   An array framework."
    )
    assert run("history", "search", "nothing").stdout == "Nothing was found.\n"


def test_json(run: Run) -> None:
    with History() as history:
        history.put(None, HEAD, [USER, ANSWER], {"seed": 1})
    listed = json.loads(run("history", "list", "--json").stdout)
    assert listed["database"].endswith("history.db")
    assert [each["title"] for each in listed["conversations"]] == ["What is MLX?"]
    shown = json.loads(run("history", "show", "--json").stdout)
    assert shown["messages"] == [USER, ANSWER]
    assert shown["history"]["messages"][1]["stats"] == {"seed": 1}
    matches = json.loads(run("history", "search", "mlx", "--json").stdout)["matches"]
    assert [(each["id"], each["role"]) for each in matches] == [(1, "user")]
    deleted = json.loads(run("history", "delete", "last", "-y", "--json").stdout)
    assert deleted == {"deleted": 1, "ids": [1]}


def test_export(run: Run, tmp_path: Path) -> None:
    with History() as history:
        history.put(None, Head("nano", settings={"seed": 1}), [USER, ANSWER])
    path = tmp_path / "chat.json"
    result = run("history", "export", "1", "-o", str(path))
    assert (result.exit_code, result.stdout) == (0, f"Conversation 1 is in {path}.\n")
    assert Conversation.load(path) == Conversation("nano", [USER, ANSWER], {"seed": 1})
    assert run("history", "export").stdout == path.read_text()
    result = run("history", "export", "-o", str(path))
    assert (result.exit_code, result.stderr) == (
        1,
        f"Error: {path} exists already.\nHint: Choose another name, or remove it.\n",
    )
    run("history", "export", "-o", str(tmp_path / "chat.md"))
    assert (tmp_path / "chat.md").read_text() == run("history", "export", "--format", "md").stdout
    assert (tmp_path / "chat.md").read_text().startswith("# What is MLX?\n")


def test_delete_asks(run: Run) -> None:
    with History() as history:
        for _ in range(3):
            history.put(None, HEAD, [USER])
    assert run("history", "delete").exit_code == 2
    assert run("history", "delete", "1", "--all").exit_code == 2
    result = run("history", "delete", "1")
    assert result.exit_code == 2
    assert "Nobody can be asked here: add --yes to delete without asking." in result.stderr
    assert run("history", "delete", "1", "1", "-y").stdout == "Deleted 1 conversation.\n"
    result = run("history", "delete", "2", "9", "-y")
    assert (result.exit_code, result.stderr) == (
        1,
        "Error: There is no conversation 9.\nHint: List them: phimlx history list\n",
    )
    assert run("history", "delete", "--all", "-y").stdout == "Deleted 2 conversations.\n"


@pytest.mark.parametrize("id", ["first", "-1", "1" * 30, "²"])
def test_what_is_no_number(id: str, run: Run) -> None:
    result = run("history", "show", "--", id)
    assert result.exit_code == 2
    assert f"'{id}' is not the number of a conversation." in result.stderr


def test_a_chat_is_kept_and_gone_on_with(loaded: Loaded, tmp_path: Path) -> None:
    flags = ("--model", "nano", "--system", "Be brief.", "--temp", "0.5")
    loaded(["One.", "Two."], "chat", *flags, "--adapter-path", str(tmp_path), input="a\nb\n")
    assert kept() == [
        ("system", "Be brief."),
        *(("user", "a"), ("assistant", "One."), ("user", "b"), ("assistant", "Two.")),
    ]
    result = loaded(["Three."], "chat", "--continue", input="c\n")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "Three.\n", "")
    assert loaded.sources == [("nano", str(tmp_path))] * 2
    assert [each["content"] for each in loaded.phi.prompts[0]] == [
        *("Be brief.", "a", "One.", "b", "Two.", "c")
    ]
    assert loaded.phi.options[0]["temperature"] == 0.5
    assert kept()[-2:] == [("user", "c"), ("assistant", "Three.")]
    loaded(["Four."], "chat", "--continue", "1", "--model", "phi-4", input="d\n")
    assert loaded.sources[-1] == ("phi-4", None)
    with History() as history:
        assert [each.model for each in history.read(1).entries if each.model] == [
            *("nano", "nano", "nano", "phi-4")
        ]


def test_undo_retry_and_clear_are_kept(loaded: Loaded) -> None:
    replies = ["One.", "Two.", "Two again.", "Three."]
    loaded(replies, "chat", input="a\nb\n/retry\n/undo\n/clear\nc\n")
    assert kept(1) == [("user", "a"), ("assistant", "One.")]
    assert kept(2) == [("user", "c"), ("assistant", "Three.")]


def test_a_question_without_answer_is_kept_for_retry(loaded: Loaded) -> None:
    result = loaded([GenerationError("No.", "Say less.")], "chat", input="a\n")
    assert result.exit_code == 1
    assert kept() == [("user", "a")]
    loaded(["One."], "chat", "--continue", input="/retry\n")
    assert kept() == [("user", "a"), ("assistant", "One.")]


def test_load_and_history_inside_a_chat(loaded: Loaded) -> None:
    with History() as history:
        history.put(None, HEAD, [USER, ANSWER, USER, ANSWER, {"role": "user", "content": "So?"}])
    lines = "/history\n/history frame array\n/history nowhere\n/load 1\nmore\n"
    result = loaded(["Yes."], "chat", "--model", "nano", input=lines)
    assert result.stderr == (
        "1  What is MLX?\nGo on with one: /load ID\n"
        "1  assistant: An array framework.\n1  assistant: An array framework.\n"
        "Go on with one: /load ID\n"
        "Nothing was found.\n"
        "… 2 messages before\n» What is MLX?\nAn array framework.\n» So?\n"
        "That has no answer yet; /retry asks again.\n"
        "Loaded 4 messages from conversation 1.\n"
    )
    assert kept()[-2:] == [("user", "more"), ("assistant", "Yes.")]
    assert loaded(["x"], "chat", input="/load 7\n").stderr == (
        "Error: There is no conversation 7.\nHint: List them: phimlx history list\n"
    )


@pytest.mark.parametrize("command", [["chat"], ["generate"]])
@pytest.mark.parametrize("switch", ["--private", "PHIMLX_HISTORY"])
def test_nothing_is_kept(
    command: list[str], switch: str, loaded: Loaded, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if switch.startswith("--"):
        command = [*command, switch]
    else:
        monkeypatch.setenv(switch, "false")
    assert loaded(["One."], *command, input="a\n").stdout == "One.\n"
    assert not data.exists()


def test_a_switch_that_is_neither_on_nor_off(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PHIMLX_HISTORY", "perhaps")
    assert loaded(["One."], "chat", input="a\n").stderr == (
        "Error: PHIMLX_HISTORY: history: 'perhaps' is neither true nor false.\nHint: Unset it.\n"
    )


def test_a_history_that_cannot_be_written_leaves_the_chat(loaded: Loaded, data: Path) -> None:
    data.touch()
    for command in (["chat"], ["generate"]):
        result = loaded(["One."], *command, input="a\n")
        assert (result.exit_code, result.stdout) == (0, "One.\n")
        assert result.stderr == (
            f"Warning: this conversation is not kept. {data / 'history.db'} cannot be written: "
            f"{data} is not a folder.\n"
        )


def test_a_conversation_that_is_deleted_meanwhile_is_kept_no_further(loaded: Loaded) -> None:
    class Deleting(FakePhi):
        def stream(self, prompt: Any, **options: Any) -> Any:
            with History() as history:
                history.delete_all()
            return super().stream(prompt, **options)

    loaded.phi = Deleting("One.", "Two.")
    result = loaded._run("chat", input="a\nb\n")
    assert result.stdout == "One.\nTwo.\n"
    assert result.stderr == (
        "Warning: what is said from here on is not kept. There is no conversation 1.\n"
    )
    with History() as history:
        assert history.conversations() == []


def test_generate_is_kept_and_goes_on(loaded: Loaded) -> None:
    loaded(["One."], "generate", "--model", "nano", "--seed", "3", "a")
    result = loaded(["Two."], "generate", "--continue", "b")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "Two.\n", "")
    assert loaded.sources[-1] == ("nano", None)
    assert [each["content"] for each in loaded.phi.prompts[0]] == ["a", "One.", "b"]
    assert loaded.phi.options[0]["seed"] == 3
    assert kept() == [("user", "a"), ("assistant", "One."), ("user", "b"), ("assistant", "Two.")]
    loaded(["Three."], "chat", "--continue", input="c\n")
    loaded(["Four."], "generate", "--continue", "--private", "d")
    assert kept()[4:] == [("user", "c"), ("assistant", "Three.")]
    for flag in ("--raw", "--prompts"):
        more = [flag, "x.jsonl", "-o", "y"] if flag == "--prompts" else [flag, "e"]
        assert loaded([], "generate", "--continue", *more).exit_code == 2


def test_generate_keeps_an_interrupted_answer_and_its_question(loaded: Loaded) -> None:
    loaded([Script(["Once ", INTERRUPT, "upon"])], "generate", "a")
    loaded([Script([INTERRUPT])], "generate", "b")
    assert kept(1) == [("user", "a"), ("assistant", "Once upon")]
    assert kept(2) == [("user", "b")]


def test_generate_keeps_where_a_picture_is(loaded: Loaded, tmp_path: Path) -> None:
    path = tmp_path / "cat.png"
    Image.new("RGB", (6, 4)).save(path)
    loaded(["A cat."], "generate", "--image", str(path), "What is it?")
    with History() as history:
        parts = history.read(1).messages[0]["content"]
    assert [part["type"] for part in parts] == ["image", "text"]
    assert parts[0]["path"] == str(path)
    loaded(["Black."], "generate", "--continue", "--image", str(path), "And this?")
    assert [[part["type"] for part in each["content"]] for each in loaded.phi.prompts[0][::2]] == [
        ["image", "text"]
    ] * 2
    path.unlink()
    result = loaded([], "generate", "--continue", "Which colour?")
    assert result.exit_code == 1
    assert result.stderr.startswith(
        "Error: Conversation 1 shows a picture that cannot be read again. "
    )


def test_a_conversation_with_an_address_is_not_kept(loaded: Loaded) -> None:
    loaded(["A cat."], "generate", "--image", "https://x.example/cat.png", "What is it?")
    with History() as history:
        assert history.conversations() == []


CALL = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {"x": 1}}]}
TOOLS = [{"name": "f", "description": "F", "parameters": {"type": "object", "properties": {}}}]
RESULT = {"role": "tool", "content": "2"}
PICTURE = {"type": "image", "path": "/a.png", "sha256": "0"}


def test_rows_for_training_are_what_train_takes(run: Run, tmp_path: Path) -> None:
    thought = {**ANSWER, "reasoning": "MLX it is"}
    with History() as history:
        history.append(history.create(Head("nano", system="Be brief.")), USER, thought, USER)
        tools = Head("nano", tools=TOOLS)
        history.append(history.create(tools), USER, CALL, RESULT, ANSWER)
        odd = {"role": "user", "content": "half \ud800 \x1b[31m"}
        history.append(history.create(HEAD), odd, ANSWER)
    target = tmp_path / "rows.jsonl"
    result = run("history", "export", "--train", "1", "2", "3", "--yes", "-o", str(target))
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in target.read_text().splitlines()]
    assert [len(row["messages"]) for row in rows] == [3, 4, 2]
    assert rows[0]["messages"][0] == {"role": "system", "content": "Be brief."}
    assert rows[0]["messages"][2]["reasoning_content"] == "MLX it is"
    assert rows[1]["tools"] == TOOLS
    assert oct(target.stat().st_mode & 0o777) == "0o600"
    for name in (None, "phi-4-mini-reasoning"):
        data = load_data(target, RowEncoder.load(NANO, name))["train"]
        assert (data.faults.count, len(data.examples), dict(data.skipped)) == (0, 3, {})
    assert all(each.supervised.any() for each in data.examples)


def test_each_conversation_is_asked_about(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("phimlx.terminal.output.Output.can_ask", True)
    with History() as history:
        for text in ("first", "second", "third"):
            history.append(history.create(HEAD), {"role": "user", "content": text}, ANSWER)
        unanswered = history.create(HEAD)
        history.append(unanswered, USER)
        shown = {"role": "user", "content": [{"type": "text", "text": "this"}, PICTURE]}
        history.append(history.create(HEAD), shown, ANSWER)
    target = tmp_path / "rows.jsonl"
    result = run("history", "export", "--train", "-o", str(target), input="y\nn\ny\n")
    assert result.exit_code == 0, result.output
    said = [json.loads(line)["messages"][0]["content"] for line in target.open()]
    assert said == ["third", "first"]  # the one that went on last first
    assert result.stderr.count("Learn from ") == 3
    assert "is left out: nothing was answered in it." in result.stderr
    assert "pictures, sounds or videos are in it, and training takes text alone." in result.stderr
    refused = run("history", "export", "--train", "-o", str(target) + "2", input="n\nn\nn\n")
    assert refused.exit_code == 1
    assert not Path(str(target) + "2").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--train", "--yes"), 2, "--yes goes with IDs"),
        (("--train", "1"), 2, "Nobody can be asked here"),
        (("1", "2"), 2, "--yes and several IDs go with --train."),
        (("--train", "1", "--yes", "--format", "md"), 2, "--format does not go with --train."),
        (("--train", "7", "--yes"), 1, "There is no conversation 7."),
    ],
)
def test_nothing_is_written_without_consent(
    run: Run, arguments: tuple[str, ...], code: int, message: str
) -> None:
    with History() as history:
        history.append(history.create(HEAD), USER, ANSWER)
    result = run("history", "export", *arguments)
    assert result.exit_code == code
    assert message in result.stderr
    assert ANSWER["content"] not in result.stdout
