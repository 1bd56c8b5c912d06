"""A reply shown plainly: what goes to stdout, what to a watched stderr."""

from __future__ import annotations

from typing import cast

import pytest

from phimlx.generation.reply import Reply
from phimlx.generation.stream import Stream
from phimlx.prompt.tools import ToolCall
from phimlx.terminal.interrupt import Interruptible
from phimlx.terminal.output import Output
from phimlx.terminal.reply import print_reply, reply_summary
from tests.terminal.fake_phi import FakeStream, Script

REASONED = Script(
    [("reasoning", "2 and 2"), ("reasoning", " is 4.\x1b[2J"), "", "It is", " 4.\x9b"],
    [ToolCall("say", {"text": "4\x1b"})],
)


def play(script: Script, output: Output) -> Reply:
    return print_reply(Interruptible(cast(Stream, FakeStream(script, 1))), output)


def test_a_pipe_gets_the_answer_and_calls_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    play(REASONED, Output())
    assert capsys.readouterr() == (
        'It is 4.\n{"name": "say", "arguments": {"text": "4\\u001b"}}\n',
        "",
    )


def test_a_watched_stderr_gets_the_reasoning(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("NO_COLOR", "1")
    play(REASONED, Output())
    play(Script([("reasoning", "only that")]), Output())
    out, err = capsys.readouterr()
    assert out.startswith("It is 4.\n")
    assert err == "2 and 2 is 4.[2J\n\nonly that\n"


def test_with_json_nothing_is_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert play(REASONED, Output(json=True)).text == "It is 4.\x9b"
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("text", "shown"), [("a\n", "a\n"), (" a", " a\n"), ("", "")])
def test_an_answer_ends_its_line(text: str, shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    play(Script([text]), Output())
    assert capsys.readouterr().out == shown


def test_a_line_about_what_it_took() -> None:
    reply = Reply(seed=0, content=None, finish_reason="length")
    reply.stats.prompt_tokens, reply.stats.cached_tokens = 30, 10
    reply.stats.prefill_seconds = 0.5
    reply.stats.generated_tokens, reply.stats.generate_seconds = 11, 2.0
    reply.stats.peak_memory = 3 * 2**30 // 2
    assert reply_summary(reply) == (
        "30 prompt tokens (10 cached), 40.0/s · 11 tokens, cut there, 5.0/s · peak 1.61 GB"
    )
