"""What a conversation remembers, gives up, saves and reads back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phimlx.errors import SessionError
from phimlx.generation.reply import Reply
from phimlx.prompt.tools import ToolCall
from phimlx.terminal.conversation import Conversation
from tests.terminal.fake_phi import Said

USER = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "hello"}


def reply(text: str, reasoning: str | None = None, calls: list[ToolCall] | None = None) -> Reply:
    return Reply(seed=0, content=Said(text, reasoning or "", calls or []))


def talk(*exchanges: tuple[str, str]) -> Conversation:
    conversation = Conversation("fake")
    for question, answer in exchanges:
        conversation.record(conversation.ask(question), reply(answer))
    return conversation


def test_a_turn_changes_the_messages_once_answered() -> None:
    conversation = Conversation("fake")
    turn = conversation.ask("hi")
    assert conversation.messages == []
    assert conversation.prompt(turn) == [USER]
    conversation.record(turn, reply("hello"))
    assert conversation.messages == [USER, ANSWER]


def test_reasoning_and_tool_calls_are_kept_and_reasoning_is_not_sent_again() -> None:
    conversation = Conversation("fake")
    call = ToolCall("search", {"q": "MLX"})
    conversation.record(conversation.ask("hi"), reply("", "hm", [call]))
    answer = {
        "role": "assistant",
        "content": "",
        "reasoning": "hm",
        "tool_calls": [{"name": "search", "arguments": {"q": "MLX"}}],
    }
    assert conversation.messages == [USER, answer]
    turn = conversation.answer_tools(["found", "found more"])
    del answer["reasoning"]
    assert conversation.prompt(turn) == [
        USER,
        answer,
        {"role": "tool", "content": "found"},
        {"role": "tool", "content": "found more"},
    ]


def test_an_abandoned_turn_leaves_all_as_it_was_and_can_be_retried() -> None:
    conversation = talk(("hi", "hello"))
    conversation.abandon(conversation.ask("too long"))
    assert conversation.messages == [USER, ANSWER]
    turn = conversation.retry()
    assert conversation.prompt(turn) == [USER, ANSWER, {"role": "user", "content": "too long"}]
    conversation.record(turn, reply("answer"))
    assert [message["content"] for message in conversation.messages] == [
        "hi",
        "hello",
        "too long",
        "answer",
    ]
    assert conversation.unanswered == ()


def test_retry_replaces_the_last_answer_only_once_there_is_another() -> None:
    conversation = talk(("hi", "hello"))
    turn = conversation.retry()
    assert conversation.prompt(turn) == [USER]
    conversation.abandon(turn)
    assert conversation.messages == [USER, ANSWER]
    conversation.record(conversation.retry(), reply("hello again"))
    assert conversation.messages == [USER, {"role": "assistant", "content": "hello again"}]


def test_retry_needs_something_that_was_asked() -> None:
    conversation = Conversation("fake")
    conversation.system = "Be brief."
    with pytest.raises(SessionError, match=r"^There is nothing to retry\.$"):
        conversation.retry()


def test_undo_takes_back_a_message_and_all_that_came_of_it() -> None:
    conversation = talk(("hi", "hello"), ("and", "so"))
    conversation.record(conversation.answer_tools(["4"]), reply("four"))
    assert conversation.undo() == "and"
    assert conversation.messages == [USER, ANSWER]
    assert conversation.undo() == "hi"
    with pytest.raises(SessionError, match=r"^There is nothing to undo\.$"):
        conversation.undo()


def test_undo_takes_back_a_message_without_answer_first() -> None:
    conversation = talk(("hi", "hello"))
    conversation.abandon(conversation.ask("lost"))
    assert conversation.undo() == "lost"
    assert conversation.messages == [USER, ANSWER]
    assert conversation.unanswered == ()


def test_system_prompt_is_set_replaced_and_removed_in_place() -> None:
    conversation = talk(("hi", "hello"))
    conversation.system = "Be brief."
    assert conversation.messages == [{"role": "system", "content": "Be brief."}, USER, ANSWER]
    conversation.system = "Be kind."
    assert conversation.messages == [{"role": "system", "content": "Be kind."}, USER, ANSWER]
    conversation.system = None
    assert conversation.messages == [USER, ANSWER]
    assert conversation.system is None


def test_clear_keeps_the_system_prompt_and_a_message_without_answer() -> None:
    conversation = talk(("hi", "hello"))
    conversation.system = "Be brief."
    conversation.abandon(conversation.ask("lost"))
    conversation.clear()
    assert conversation.messages == [{"role": "system", "content": "Be brief."}]
    assert conversation.prompt(conversation.retry())[1:] == [{"role": "user", "content": "lost"}]


def test_clear_drops_a_tool_result_without_its_call() -> None:
    conversation = talk(("hi", "hello"))
    conversation.abandon(conversation.answer_tools(["4"]))
    conversation.clear()
    assert conversation.unanswered == ()


contents = st.text(st.characters())
calls = st.fixed_dictionaries(
    {
        "name": contents,
        "arguments": st.dictionaries(contents, contents | st.integers() | st.none()),
    }
)
messages = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "tool"]), "content": contents})
    | st.fixed_dictionaries(
        {"role": st.just("assistant"), "content": contents},
        optional={"reasoning": contents, "tool_calls": st.lists(calls, min_size=1)},
    )
)


@given(messages, st.none() | st.just([{"name": "search", "parameters": {"a": [1.5]}}]))
def test_a_saved_conversation_reloads_exactly(
    tmp_path_factory: pytest.TempPathFactory,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None,
) -> None:
    path = tmp_path_factory.mktemp("chat") / "chat.json"
    settings = {"temperature": 0.7, "stop": ("a", "\x1b"), "seed": 1, "max_tokens": 5}
    conversation = Conversation("fake", messages, settings, tools)
    conversation.save(path)
    assert Conversation.load(path) == conversation


def test_save_does_not_overwrite_what_it_did_not_write(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("mine")
    with pytest.raises(SessionError) as caught:
        talk(("hi", "hello")).save(path)
    assert str(caught.value) == f"{path} exists already."
    assert caught.value.hint == "Choose another name, or remove it."
    assert path.read_text() == "mine"


GOOD = {
    "format": "phimlx-chat",
    "version": 1,
    "model": "fake",
    "settings": {},
    "tools": None,
    "messages": [USER, ANSWER],
}


@pytest.mark.parametrize(
    ("session", "reason"),
    [
        ([], " is not a saved chat."),
        ({**GOOD, "format": "other"}, " is not a saved chat."),
        (
            {**GOOD, "version": 2},
            " has version 2 of the format; this phimlx reads version 1.",
        ),
        ({**GOOD, "model": 3}, " is damaged: model is missing or of the wrong type."),
        ({**GOOD, "messages": {}}, " is damaged: messages is missing or of the wrong type."),
        ({**GOOD, "settings": None}, " is damaged: settings is missing or of the wrong type."),
        (
            {**GOOD, "settings": {"top_p": 2}},
            " is damaged: top-p: 2.0 is not in the range 0<x<=1.",
        ),
        ({**GOOD, "tools": "search"}, " is damaged: Tools must be a list."),
        ({**GOOD, "messages": [3]}, " is damaged: message 1 is not an object."),
        (
            {**GOOD, "messages": [USER, {"role": "robot", "content": ""}]},
            " is damaged: message 2 has the unknown role 'robot'.",
        ),
        (
            {**GOOD, "messages": [{"role": ["user"], "content": ""}]},
            " is damaged: message 1 has the unknown role ['user'].",
        ),
        (
            {**GOOD, "messages": [USER, {"role": "system", "content": ""}]},
            " is damaged: message 2 is a system prompt that does not come first.",
        ),
        (
            {**GOOD, "messages": [{"role": "user", "content": None}]},
            " is damaged: message 1 has no text as its content.",
        ),
        (
            {**GOOD, "messages": [{**USER, "tool_calls": []}]},
            " is damaged: message 1 has the unknown field 'tool_calls'.",
        ),
        (
            {**GOOD, "messages": [{**ANSWER, "reasoning": 1}]},
            " is damaged: message 1 has reasoning that is not text.",
        ),
        (
            {**GOOD, "messages": [{**ANSWER, "tool_calls": [{"name": "a"}]}]},
            " is damaged: message 1 has tool calls that are not a list of names and arguments.",
        ),
    ],
)
def test_what_is_wrong_with_a_saved_chat_is_said(
    session: object, reason: str, tmp_path: Path
) -> None:
    path = tmp_path / "chat.json"
    path.write_text(json.dumps(session))
    with pytest.raises(SessionError) as caught:
        Conversation.load(path)
    assert str(caught.value) == f"{path}{reason}"
