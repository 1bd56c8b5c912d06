"""Text of half characters, which JSON's escapes can hold: every dialect answers it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.server.running import Running

TEXTS = ("half \ud83d", "\ude00", "\ude00\ud83d", "\ud83d\ud83d\ude00")


def bodies(text: str) -> dict[str, dict[str, Any]]:
    """A request with the text in as many places as a dialect has for one."""
    user = {"role": "user", "content": text}
    chat = [{"role": "system", "content": text}, user]
    parameters = {"type": "object"}
    function = {"name": "f", "description": text, "parameters": parameters}
    return {
        "/v1/chat/completions": {
            "messages": chat,
            "tools": [{"type": "function", "function": function}],
            "user": text,
            "max_tokens": 4,
        },
        "/v1/completions": {"prompt": text, "echo": True, "max_tokens": 4},
        "/v1/responses": {
            "input": [{"type": "message", **user}],
            "instructions": text,
            "tools": [{"type": "function", **function}],
            "max_output_tokens": 4,
        },
        "/v1/messages": {
            "messages": [user],
            "system": text,
            "tools": [{"name": "f", "description": text, "input_schema": parameters}],
            "max_tokens": 4,
        },
        "/api/chat": {"messages": chat, "options": {"num_predict": 4}},
        "/api/generate": {"prompt": text, "system": text, "options": {"num_predict": 4}},
    }


def send(server: Running, path: str, body: dict[str, Any]) -> Any:
    headers = {"content-type": "application/json"}
    content = json.dumps({"model": "nano", **body})
    return server.client.post(path, content=content, headers=headers)


@pytest.mark.parametrize("path", bodies(""))
@pytest.mark.parametrize("stream", [False, True])
def test_half_characters_are_read(server: Running, path: str, stream: bool) -> None:
    for text in TEXTS:
        answer = send(server, path, {**bodies(text)[path], "stream": stream})
        assert answer.status_code == 200, answer.text[:300]
        assert '"error":{' not in answer.text
        assert '"error":"' not in answer.text


@pytest.mark.parametrize("path", bodies(""))
def test_half_characters_in_a_name_are_told_of(server: Running, path: str) -> None:
    answer = send(server, path, {**bodies("a")[path], "model": "\ud83d"})
    assert answer.status_code in (400, 404)
    assert answer.json()["error"]
