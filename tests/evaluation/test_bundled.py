"""The held-out questions, what counts as right, and the whole demonstration on a few of them."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import pytest
from click.testing import CliRunner

from phimlx.cli.group import cli
from phimlx.evaluation import bundled as demo
from phimlx.evaluation.bundled import Question
from phimlx.generation.reply import Reply
from phimlx.prompt.tools import ToolCall
from tests.terminal.fake_phi import Said

TOOL = {"name": "get_weather", "parameters": {"type": "object", "properties": {}}}
CALL = '<|tool_call|>[{"name": "get_weather", "arguments": {"city": "Rome"}}]<|/tool_call|>'


def reply(text: str, *calls: ToolCall) -> Reply:
    return Reply(seed=0, content=Said(text, tool_calls=list(calls)))


def test_there_are_questions_of_every_kind() -> None:
    kinds = Counter(question.kind for question in demo.questions())
    expected = {"arithmetic", "capital", "word", "translation", "multi-turn", "tool"}
    assert set(kinds) == expected
    assert min(kinds.values()) >= 40
    assert sum(question.long for question in demo.questions()) >= 40


def test_a_sample_has_some_of_each_kind() -> None:
    chosen = demo.sample(demo.questions(), 3)
    assert set(Counter(question.kind for question in chosen).values()) == {3}


def test_text_is_right_when_it_is_the_answer() -> None:
    question = Question([], None, "7", "arithmetic", False)
    assert demo.is_right(reply(" 7\n"), question)
    assert not demo.is_right(reply("70"), question)
    assert not demo.is_right(reply("7", ToolCall("add", {})), question)


def test_a_call_is_right_by_name_and_arguments() -> None:
    question = Question([], [TOOL], CALL, "tool", False)
    assert demo.is_right(reply("", ToolCall("get_weather", {"city": "Rome"})), question)
    assert not demo.is_right(reply("", ToolCall("get_weather", {"city": "Oslo"})), question)
    assert not demo.is_right(reply("", ToolCall("get_time", {"city": "Rome"})), question)
    assert not demo.is_right(reply(CALL), question)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> list[Question]:
    """Of each kind the question with the shortest prompt, and the shortest of the long ones."""
    shortest: dict[object, Question] = {}
    for question in sorted(demo.questions(), key=lambda question: len(str(question.messages))):
        shortest.setdefault("long" if question.long else question.kind, question)
    monkeypatch.setattr(demo, "questions", lambda: list(shortest.values()))
    return list(shortest.values())


@pytest.mark.slow
def test_the_demonstration_as_an_object(
    few: list[Question], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = {scene.modality: scene for scene in reversed(demo.scenes())}
    monkeypatch.setattr(demo, "scenes", lambda folder: list(first.values()))
    result = CliRunner().invoke(cli, ["demo", "--json"], catch_exceptions=False)
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert {answer["kind"] for answer in report["answers"]} == {q.kind for q in few}
    long = [answer for answer in report["answers"] if answer["long"]]
    assert long[0]["prompt_tokens"] > 128
    exact, small = report["forms"]["bfloat16"], report["forms"]["4 bits"]
    assert exact["asked"] == small["asked"] == len(few)
    assert small["bytes"] < exact["bytes"] / 3
    assert exact["right"] >= 0.8 * len(few)
    scenes = report["scenes"]
    assert {scene["modality"] for scene in scenes} == {"speech", "vision", "both"}
    assert all(scene["right"] for scene in scenes)


def test_the_demonstration_on_a_screen(
    few: list[Question], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "questions", lambda: [few[0], *[q for q in few if q.long]])
    shown = [each for each in demo.scenes() if each.image and each.image.name == "vision-05.png"]
    monkeypatch.setattr(demo, "scenes", lambda folder: shown)
    result = CliRunner().invoke(cli, ["demo"], catch_exceptions=False)
    assert result.exit_code == 0
    text = result.stdout
    assert "It is a demonstration and knows almost nothing." in text
    assert "Converted to 4 bits: 4.72 MB -> " in text
    assert "past the LongRoPE step at 128" in text
    assert "  What shape is green?  (pictures/vision-05.png)\n  -> moon\n" in text
    assert "Try it yourself: phimlx chat --model nano" in text
    rows = [line.split() for line in text.splitlines() if line.startswith(("bfloat16", "4 bits"))]
    assert [row[-4:-2] for row in rows] == [[row[-4], "of"] for row in rows]
    assert len(rows) == 2


@pytest.mark.slow
def test_a_wrong_answer_is_called_so(few: list[Question], monkeypatch: pytest.MonkeyPatch) -> None:
    scene = next(scene for scene in demo.scenes() if scene.modality == "vision")
    monkeypatch.setattr(demo, "scenes", lambda folder: [replace(scene, answer="cloud")])
    monkeypatch.setattr(demo, "questions", lambda: few[:1])
    result = CliRunner().invoke(cli, ["demo"], catch_exceptions=False)
    assert "\n  -> plus  (wrong: it is cloud)\n" in result.stdout
