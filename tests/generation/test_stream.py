"""Replies as they are read: linear work, whatever their length."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

import phimlx
from phimlx.generation.options import GenerationOptions
from phimlx.generation.request import Request
from phimlx.prompt.reply_parser import ReplyParser

LONG = 32_000


@pytest.fixture(scope="module")
def phi() -> phimlx.Phi:
    return phimlx.load("nano", dtype="float32")


def request_of(phi: phimlx.Phi, options: GenerationOptions | None = None) -> Request:
    request = phi.request("What is 3 + 4?", options or GenerationOptions())
    request.max_tokens = LONG + 10
    return request


def take(request: Request, tokens: Iterable[int]) -> str:
    return "".join(chunk.text for token in tokens for chunk in request.take(token))


@pytest.mark.parametrize("stop", [(), "nowhere"])
def test_32_000_tokens_of_reasoning_are_put_together_when_they_are_asked_for(
    phi: phimlx.Phi, monkeypatch: pytest.MonkeyPatch, stop: str
) -> None:
    assert phi.tokenizer is not None
    think = phi.tokenizer.encode("<think>", control=True)
    word = phi.tokenizer.encode(" seven")[0]
    asked: list[str] = []
    for name in ("text", "reasoning"):
        made = getattr(ReplyParser, name).fget

        def counting(self: ReplyParser, made: property = made, name: str = name) -> str:
            asked.append(name)
            return made(self)  # type: ignore[operator]

        monkeypatch.setattr(ReplyParser, name, property(counting))
    request = request_of(phi, GenerationOptions(stop=stop))
    said = take(request, think + [word] * LONG)
    assert asked == []
    assert request.reply.reasoning == said
    assert len(said) >= LONG
    assert asked == ["reasoning"]


def test_the_reply_can_be_read_at_any_time(phi: phimlx.Phi) -> None:
    assert phi.tokenizer is not None
    request, text = request_of(phi), "A 🙂 for you"
    seen = ""
    for token in phi.tokenizer.encode(text):
        seen += take(request, [token])
        assert request.reply.text == seen
    assert text.startswith(seen)
    assert request.reply.finish_reason == "cancelled"
    end = phi.tokenizer.control_tokens["<|end|>"]
    assert seen + take(request, [end]) == text == request.reply.text
    assert request.reply.finish_reason == "stop"


def test_forward_passes_are_counted(phi: phimlx.Phi) -> None:
    reply = phi.generate("What is 3 + 4?")
    # One for the prompt, and one each for "7" and "<|end|>": the latter is fed before it is known.
    assert (len(reply.tokens), reply.stats.forward_passes) == (2, 3)
    assert phi.generate("What is 3 + 4?", max_tokens=1).stats.forward_passes == 1
