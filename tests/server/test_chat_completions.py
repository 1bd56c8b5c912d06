"""OpenAI's chat completions: what comes back is what `Phi.generate` says."""

from __future__ import annotations

import json
from typing import Any

import pytest

from phimlx.api import Phi
from tests.server.running import Running

PATH = "/v1/chat/completions"


def ask(text: str = "What is 2 plus 3?", **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    return {"model": "nano", "messages": messages, "max_tokens": 24, "temperature": 0, **more}


def events(text: str) -> list[Any]:
    """The data of a stream's events; comments do not count."""
    lines = [line for line in text.split("\n\n") if line.startswith("data: ")]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_a_reply_is_what_the_model_says_alone(server: Running, nano: Phi) -> None:
    body = ask()
    expected = nano.generate(body["messages"], max_tokens=24, temperature=0)
    found = server.post(PATH, body).json()
    assert found["object"] == "chat.completion"
    [choice] = found["choices"]
    assert choice["message"]["content"] == expected.text
    assert choice["finish_reason"] == expected.finish_reason
    assert found["usage"]["prompt_tokens"] == expected.stats.prompt_tokens
    assert found["usage"]["completion_tokens"] == len(expected.tokens)


def test_a_stream_adds_up_to_the_reply(server: Running, nano: Phi) -> None:
    body = ask("Tell me a story.", stream=True, stream_options={"include_usage": True})
    expected = nano.generate(body["messages"], max_tokens=24, temperature=0)
    *chunks, last = events(server.post(PATH, body).text)
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    said = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert "".join(said) == expected.text
    assert chunks[-1]["choices"][0] == {
        "index": 0,
        "delta": {},
        "logprobs": None,
        "finish_reason": expected.finish_reason,
    }
    assert len({(chunk["id"], chunk["created"]) for chunk in [*chunks, last]}) == 1
    assert (last["choices"], last["usage"]["completion_tokens"]) == ([], len(expected.tokens))


def test_choices_have_seeds_of_their_own(server: Running, nano: Phi) -> None:
    body = ask("Tell me a story.", n=3, temperature=1.3, seed=7)
    found = server.post(PATH, body).json()["choices"]
    options: dict[str, Any] = {"max_tokens": 24, "temperature": 1.3}
    expected = [nano.generate(body["messages"], seed=seed, **options).text for seed in (7, 8, 9)]
    assert [choice["message"]["content"] for choice in found] == expected


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({"stop": 5}, 400, "stop"),
        ({"temperature": "hot"}, 400, "temperature"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "image": "/etc/passwd"}]}]},
         400, "messages[0].content"),
        ({"nonsense": 1}, 400, "nonsense"),
        ({"model": "/etc"}, 404, None),
        ({"n": 9}, 400, "n"),
    ],
)  # fmt: skip
def test_a_wrong_field_is_named(
    server: Running, change: dict[str, Any], status: int, param: str | None
) -> None:
    answer = server.post(PATH, ask() | change)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert (error["param"] or "").startswith(param or "")
    assert server.post(PATH, ask()).status_code == 200
