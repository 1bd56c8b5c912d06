"""What Open WebUI sends, and that it gets what it reads.

`open_webui.json` has the shape of what Open WebUI 0.12.4 sent to this server, recorded between the
two while a person's steps were done in its page: chats over its connections of OpenAI's and of
Ollama's kind, with its own tools and a result of one, a picture, and the requests that it makes by
itself for titles, tags and the like; settings went through its backend. The words of its prompts
and tools are others here, three of 36 tools are left, and PICTURE stands for the data of one.
Its page's own fields (features, session_id, chat_id) end at its backend: none of them was sent on.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from phimlx.api import Phi, load
from phimlx.generation.request import Request
from phimlx.hub.resolve import NANO_MULTIMODAL
from phimlx.server.models import Loaded
from phimlx.server.service import Ask, Service
from tests.server.conftest import Say
from tests.server.running import Running

HEADERS = {
    "authorization": "Bearer none",
    "accept": "*/*",
    "accept-encoding": "gzip, deflate, br",
    "user-agent": "Python/3.11 aiohttp/3.14.5",
}
RECORDED = json.loads(Path(__file__).with_name("open_webui.json").read_text(encoding="utf-8"))
PICTURE = (NANO_MULTIMODAL / "pictures" / "vision-00.png").read_bytes()
SAID = "It is 5.\n\nIs it?"


@pytest.fixture(scope="module")
def seeing() -> Phi:
    return load("nano-multimodal")


def reply(answer: Any, stream: bool) -> tuple[str, str, dict[str, Any]]:
    """Read what was said, why it ended, and the last object."""
    text = answer.text
    if answer.headers["content-type"].startswith("text/event-stream"):
        sent = [each for each in text.split("\n\n") if each.startswith("data: ")]  # no pings
        *events, last = [each.removeprefix("data: ") for each in sent]
        assert last == "[DONE]"
        chunks = [json.loads(each) for each in events]
        choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"]]
        said = "".join(choice["delta"].get("content") or "" for choice in choices)
        return said, choices[-1]["finish_reason"], chunks[-1]
    lines = [json.loads(line) for line in text.splitlines()]
    assert (len(lines) > 1) == stream
    if "choices" in lines[-1]:
        choice = lines[-1]["choices"][0]
        return choice["message"]["content"], choice["finish_reason"], lines[-1]
    assert [line["done"] for line in lines] == [False] * (len(lines) - 1) + [True]
    return (
        "".join(line["message"]["content"] for line in lines),
        lines[-1]["done_reason"],
        lines[-1],
    )


@pytest.mark.parametrize("recorded", RECORDED, ids=[each["what"] for each in RECORDED])
def test_what_was_recorded_is_answered(
    server: Running,
    nano: Phi,
    seeing: Phi,
    say: Say,
    monkeypatch: pytest.MonkeyPatch,
    recorded: dict[str, Any],
) -> None:
    begun: list[Request] = []
    make = Service._requests

    def note(self: Service, loaded: Loaded, ask: Ask) -> list[Request]:
        begun.extend(made := make(self, loaded, ask))
        return made

    monkeypatch.setattr(Service, "_requests", note)
    say(SAID)
    filled = json.dumps(recorded["body"]).replace("PICTURE", base64.b64encode(PICTURE).decode())
    body = json.loads(filled)
    answer = server.client.post(recorded["path"], content=filled, headers=HEADERS)
    assert answer.status_code == 200, answer.text
    said, ended, last = reply(answer, body["stream"])
    assert (said, ended) == (SAID, "stop")
    if "stream_options" in body:
        assert last["usage"]["prompt_tokens"] == len(begun[0].prompt)
    messages = recorded.get("read", body["messages"])
    for message in messages:
        if isinstance(message["content"], list):
            message["content"] = [
                {"type": "image", "image": PICTURE} if part == "PICTURE" else part
                for part in message["content"]
            ]
    phi = seeing if "multimodal" in body["model"] else nano
    assert begun[0].prompt == phi.encode(messages, tools=body.get("tools"))


def test_what_it_asks_of_models(server: Running) -> None:
    def get(path: str) -> Any:
        return server.client.get(path, headers=HEADERS).json()

    assert {model["id"] for model in get("/v1/models")["data"]} >= {"nano", "nano-multimodal"}
    tags = {model["model"]: model for model in get("/api/tags")["models"]}
    assert set(tags) >= {"nano:latest", "nano-multimodal:latest"}
    assert all(tag["name"] == tag["model"] for tag in tags.values())
    assert isinstance(get("/api/ps")["models"], list)
