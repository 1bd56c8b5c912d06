"""Replies that continue what the assistant's turn already says."""

from __future__ import annotations

from typing import Any

import pytest

import phimlx
from phimlx.errors import PromptError
from phimlx.generation.options import GenerationOptions


@pytest.fixture(scope="module")
def phi() -> phimlx.Phi:
    return phimlx.load("nano", dtype="float32")


def asked(said: str | None = None) -> list[dict[str, Any]]:
    first = {"role": "user", "content": "Spell cat backwards."}
    return [first] if said is None else [first, {"role": "assistant", "content": said}]


def test_the_rest_of_a_reply_is_the_rest(phi: phimlx.Phi) -> None:
    """Cut anywhere between its tokens, where the words before are encoded as they were said."""
    assert phi.tokenizer is not None
    whole = phi.generate(asked(), temperature=0)
    assert whole.finish_reason == "stop"
    cut = 0
    for count in range(1, len(whole.tokens) - 1):
        said = phi.tokenizer.decode(whole.tokens[:count])
        if phi.tokenizer.encode(said) != whole.tokens[:count]:
            continue
        cut += 1
        reply = phi.generate(asked(said), temperature=0, continue_final_message=True)
        assert reply.tokens == whole.tokens[count:]
        assert said + reply.text == whole.text
    assert cut > 1


def test_reasoning_goes_on(phi: phimlx.Phi) -> None:
    assert phi.tokenizer is not None
    options = GenerationOptions(continue_final_message=True)
    request = phi.request(asked("<think>Let me"), options)
    for token in phi.tokenizer.encode(" see.</think>\n7", control=True):
        request.take(token)
    assert (request.reply.reasoning, request.reply.text) == (" see.", "7")


def test_without_messages_there_is_nothing_to_continue(phi: phimlx.Phi) -> None:
    message = "continue_final_message needs messages, of which the last is the assistant's."
    for prompt, raw in (("Hi", True), ([5, 6], False)):
        with pytest.raises(PromptError) as error:
            phi.generate(prompt, raw=raw, continue_final_message=True)
        assert str(error.value) == message
    with pytest.raises(PromptError, match=r"^The last message is of the role user, "):
        phi.generate("Hi", continue_final_message=True)
