"""Ollama's API, with its own client: what comes back is what `Phi.generate` says."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import ollama
import pytest

from phimlx.api import Phi, load
from phimlx.generation.engine import Engine
from phimlx.hub.resolve import NANO_MULTIMODAL
from phimlx.server import duration, ollama_models
from tests.hub.loopback_hub import Fault, Hub, serve_alone
from tests.server.conftest import Say
from tests.server.running import SECONDS, Running, running

QUESTION = "What is 2 plus 3?"
GREEDY = {"temperature": 0, "num_predict": 24}
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Tell the weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALLS = (
    '<|tool_call|>[{"name": "get_weather", "arguments": {"city": "Paris"}}, '
    '{"name": "get_weather", "arguments": {"city": "Rome"}}]<|/tool_call|>'
)
ENDED = {
    "total_duration", "load_duration", "prompt_eval_count", "prompt_eval_duration", "eval_count",
    "eval_duration",
}  # fmt: skip


def chat(text: str = QUESTION, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    return {"model": "nano", "messages": messages, "options": GREEDY, "stream": False, **more}


def generate(prompt: str = QUESTION, **more: Any) -> dict[str, Any]:
    return {"model": "nano", "prompt": prompt, "options": GREEDY, "stream": False, **more}


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def client(server: Running) -> ollama.Client:
    return ollama.Client(host=server.url, timeout=SECONDS)


@pytest.mark.parametrize("text", [QUESTION, "Tell me a story."])
@pytest.mark.parametrize("stream", [False, True])
def test_a_chat_is_what_the_model_says_alone(
    client: ollama.Client, nano: Phi, text: str, stream: bool
) -> None:
    messages = [{"role": "user", "content": text}]
    expected = nano.generate(messages, max_tokens=24, temperature=0)
    asked: dict[str, Any] = {"model": "nano", "messages": messages, "options": GREEDY}
    if stream:
        *pieces, last = client.chat(**asked, stream=True)
        assert not any(piece.done for piece in pieces)
        assert "".join(piece.message.content or "" for piece in pieces) == expected.text
    else:
        last = client.chat(**asked)
        assert last.message.content == expected.text
    assert (last.done, last.done_reason) == (True, "stop")
    assert last.message.role == "assistant"
    assert last.prompt_eval_count == expected.stats.prompt_tokens
    assert last.eval_count == len(expected.tokens)


@pytest.mark.parametrize("stream", [False, True])
def test_a_completion_is_what_the_model_says_alone(
    client: ollama.Client, nano: Phi, stream: bool
) -> None:
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": QUESTION},
    ]
    expected = nano.generate(messages, max_tokens=24, temperature=0)
    asked: dict[str, Any] = {"model": "nano", "prompt": QUESTION, "system": "Be short."}
    if stream:
        *pieces, last = client.generate(**asked, options=GREEDY, stream=True)
        said = "".join(piece.response or "" for piece in pieces)
    else:
        last = client.generate(**asked, options=GREEDY)
        said = last.response or ""
    assert said == expected.text
    assert last.context == [*nano.encode(messages), *expected.tokens]


def test_a_context_goes_on_with_a_conversation(server: Running, nano: Phi) -> None:
    first = server.post("/api/generate", generate()).json()
    found = server.post("/api/generate", generate("And 1?", context=first["context"])).json()
    tokens = [*first["context"], *nano.encode("And 1?")]
    assert found["response"] == nano.generate(tokens, max_tokens=24, temperature=0).text
    assert found["prompt_eval_count"] == len(tokens)


def test_a_raw_prompt_is_taken_as_it_is(server: Running, nano: Phi) -> None:
    prompt = f"<|user|>{QUESTION}<|end|><|assistant|>"
    expected = nano.generate(prompt, raw=True, max_tokens=24, temperature=0)
    found = server.post("/api/generate", generate(prompt, raw=True)).json()
    assert found["response"] == expected.text
    assert found["prompt_eval_count"] == len(nano.encode(QUESTION))
    assert "context" not in found


@pytest.mark.parametrize("path", ["/api/chat", "/api/generate"])
def test_what_lines_hold(server: Running, path: str) -> None:
    body = {**(chat() if path == "/api/chat" else generate()), "stream": True, "model": "nano"}
    answer = server.post(path, body)
    assert answer.headers["content-type"] == "application/x-ndjson"
    *pieces, last = lines(answer.text)
    assert pieces
    for each in (*pieces, last):
        assert each["model"] == "nano"
        assert each["created_at"].endswith("Z")
    assert all(set(last) >= ENDED and not ENDED & set(piece) for piece in pieces)
    durations = [last[name] for name in ENDED if name.endswith("duration")]
    assert all(isinstance(each, int) and each >= 0 for each in durations)
    assert last["total_duration"] >= last["prompt_eval_duration"] + last["eval_duration"] > 1000


OPTIONS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"temperature": 1.2, "seed": 5, "num_predict": 12},
     {"temperature": 1.2, "seed": 5, "max_tokens": 12}),
    ({"temperature": 1.5, "seed": 6, "top_k": 3, "top_p": 0.8, "min_p": 0.1, "num_predict": 12},
     {"temperature": 1.5, "seed": 6, "top_k": 3, "top_p": 0.8, "min_p": 0.1, "max_tokens": 12}),
    ({"temperature": 0, "repeat_penalty": 1.5, "presence_penalty": 0.5, "frequency_penalty": 0.5,
      "num_predict": 12},
     {"temperature": 0, "repetition_penalty": 1.5, "presence_penalty": 0.5,
      "frequency_penalty": 0.5, "max_tokens": 12}),
    ({"temperature": 0, "stop": [" "], "num_predict": -1}, {"temperature": 0, "stop": [" "]}),
    ({"temperature": 0, "num_predict": 5000, "top_k": -1, "num_ctx": 4096, "num_gpu": 1,
      "mirostat": 0, "wholly_unknown": 5, "stop": None, "repeat_last_n": 64, "repeat_penalty": 1.0},
     {"temperature": 0}),
]  # fmt: skip


@pytest.mark.parametrize(("options", "own"), OPTIONS)
def test_options_mean_what_they_do_here(
    server: Running, nano: Phi, options: dict[str, Any], own: dict[str, Any]
) -> None:
    body = chat("Tell me a story.", options=options)
    expected = nano.generate(body["messages"], **own)
    found = server.post("/api/chat", body).json()
    assert found["message"]["content"] == expected.text
    assert found["done_reason"] == expected.finish_reason


@pytest.mark.parametrize("name", ["truncate", "shift"])
def test_what_a_prompt_that_fits_does_not_need_changes_nothing(server: Running, name: str) -> None:
    said = [server.post("/api/chat", chat("2+2", **more)) for more in ({}, {name: True})]
    assert [answer.status_code for answer in said] == [200, 200]
    assert said[0].json()["message"] == said[1].json()["message"]


def test_a_reply_that_is_cut_says_so(server: Running) -> None:
    body = chat("Tell me a story.", options={"temperature": 0, "num_predict": 2})
    assert server.post("/api/chat", body).json()["done_reason"] == "length"


def test_a_reply_goes_on_from_the_assistants_words(server: Running, nano: Phi) -> None:
    messages = [
        {"role": "user", "content": "Tell me a story."},
        {"role": "assistant", "content": "Once"},
    ]
    expected = nano.generate(messages, max_tokens=24, temperature=0, continue_final_message=True)
    found = server.post("/api/chat", chat(messages=messages)).json()
    assert found["message"]["content"] == expected.text


@pytest.mark.parametrize("stream", [False, True])
def test_tools_are_called_with_objects(client: ollama.Client, say: Say, stream: bool) -> None:
    say(f"I look. {CALLS}")
    asked: dict[str, Any] = {
        "model": "nano",
        "messages": [{"role": "user", "content": "Paris or Rome?"}],
        "tools": [TOOL],
    }
    replies = list(client.chat(**asked, stream=True)) if stream else [client.chat(**asked)]
    assert "".join(reply.message.content or "" for reply in replies) == "I look. "
    calls = [call for reply in replies for call in reply.message.tool_calls or ()]
    assert [(call.function.name, call.function.arguments) for call in calls] == [
        ("get_weather", {"city": "Paris"}),
        ("get_weather", {"city": "Rome"}),
    ]
    assert replies[-1].done_reason == "stop"


def test_calls_and_results_are_read_from_the_history(server: Running, nano: Phi) -> None:
    own = [
        {"role": "user", "content": "Paris?"},
        {"role": "assistant", "content": "",
         "tool_calls": [{"name": "get_weather", "arguments": {"city": "Paris"}}]},
        {"role": "tool", "content": "sun"},
    ]  # fmt: skip
    call = {"id": "call_1", "function": {"index": 0, **own[1]["tool_calls"][0]}}  # type: ignore[index]
    messages = [
        own[0],
        {"role": "assistant", "content": "", "thinking": "Hm.", "tool_calls": [call]},
        {"role": "tool", "content": "sun", "tool_name": "get_weather", "tool_call_id": "call_1"},
    ]
    expected = nano.generate(own, tools=[TOOL], max_tokens=24, temperature=0)
    found = server.post("/api/chat", chat(messages=messages, tools=[TOOL])).json()
    assert found["prompt_eval_count"] == expected.stats.prompt_tokens
    assert found["message"]["content"] == expected.text


@pytest.mark.parametrize(
    ("think", "thinking"), [(True, "Two and three."), (None, "Two and three."), (False, None)]
)
@pytest.mark.parametrize("stream", [False, True])
def test_reasoning_stands_apart(
    client: ollama.Client,
    say: Say,
    monkeypatch: pytest.MonkeyPatch,
    think: bool | None,
    thinking: str | None,
    stream: bool,
) -> None:
    say("<think>Two and three.</think>Five.")
    monkeypatch.setattr(ollama_models, "reasons", lambda served: True)
    asked: dict[str, Any] = {
        "model": "nano",
        "messages": [{"role": "user", "content": QUESTION}],
        "think": think,
    }
    replies = list(client.chat(**asked, stream=True)) if stream else [client.chat(**asked)]
    thought = "".join(reply.message.thinking or "" for reply in replies)
    assert (thought or None) == thinking
    assert "".join(reply.message.content or "" for reply in replies) == "Five."


@pytest.mark.parametrize("stream", [False, True])
def test_a_reply_is_held_to_a_format(client: ollama.Client, stream: bool) -> None:
    schema = {
        "type": "object",
        "properties": {"sum": {"enum": [5, 6]}},
        "required": ["sum"],
        "additionalProperties": False,
    }
    asked: dict[str, Any] = {"model": "nano", "prompt": QUESTION, "options": GREEDY}
    asked["format"] = schema
    replies = list(client.generate(**asked, stream=True)) if stream else [client.generate(**asked)]
    said = "".join(reply.response or "" for reply in replies)
    assert json.loads(said)["sum"] in (5, 6)


def test_json_is_an_object(server: Running, nano: Phi) -> None:
    body = chat(format="json", options={"temperature": 0, "num_predict": 8})
    expected = nano.generate(
        body["messages"], schema={"type": "object"}, max_tokens=8, temperature=0
    )
    found = server.post("/api/chat", body).json()
    assert found["message"]["content"] == expected.text
    assert expected.text.lstrip().startswith("{")


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_are_told(client: ollama.Client, nano: Phi, stream: bool) -> None:
    messages = [{"role": "user", "content": "Tell me a story."}]
    expected = nano.generate(messages, max_tokens=24, temperature=0, logprobs=True, top_logprobs=2)
    asked: dict[str, Any] = {"model": "nano", "messages": messages, "options": GREEDY}
    asked |= {"logprobs": True, "top_logprobs": 2}
    replies = list(client.chat(**asked, stream=True)) if stream else [client.chat(**asked)]
    told = [each for reply in replies for each in reply.logprobs or ()]
    said = expected.logprobs[: expected.said]
    assert [each.logprob for each in told] == pytest.approx([own.logprob for own in said])
    assert "".join(each.token for each in told) == expected.text
    assert [len(each.top_logprobs or ()) for each in told] == [2] * len(said)


def picture(name: str) -> bytes:
    return (NANO_MULTIMODAL / "pictures" / name).read_bytes()


@pytest.mark.slow
def test_pictures_are_seen(client: ollama.Client) -> None:
    seeing = load("nano-multimodal")
    data, question = picture("vision-01.png"), "What is in the picture?"
    expected = seeing.generate(question, images=[data], max_tokens=24, temperature=0)
    message = {"role": "user", "content": question, "images": [data]}
    found = client.chat("nano-multimodal", [message], options=GREEDY)
    assert found.message.content == expected.text
    assert found.prompt_eval_count == expected.stats.prompt_tokens
    whole = client.generate("nano-multimodal", question, images=[data], options=GREEDY)
    assert (whole.response, whole.context) == (expected.text, None)
    raw = f"<|user|><|image_1|>{question}<|end|><|assistant|>"
    whole = client.generate("nano-multimodal", raw, images=[data], raw=True, options=GREEDY)
    assert whole.response == expected.text


def test_models_are_listed_and_shown(client: ollama.Client) -> None:
    listed = {model.model: model for model in client.list().models}
    assert {"nano:latest", "nano-multimodal:latest"} <= set(listed)
    entry = listed["nano:latest"]
    assert entry.size
    assert len(entry.digest or "") == 64
    assert entry.details is not None
    assert (entry.details.family, entry.details.parameter_size) == ("phi3", "2.4M")
    for name in ("nano", "nano:latest"):
        shown = client.show(name)
        assert shown.capabilities == ["completion", "tools"]
        assert shown.modelinfo is not None
        architecture = shown.modelinfo["general.architecture"]
        assert shown.modelinfo[f"{architecture}.context_length"] == 1024
        assert "<|tool|>" in (shown.template or "")
    assert client.show("nano-multimodal").capabilities == [
        "completion", "tools", "vision", "audio",
    ]  # fmt: skip


def test_older_programs_say_name_for_model(server: Running) -> None:
    assert server.post("/api/show", {"name": "nano"}).json()["license"] == "MIT"


def test_a_program_sees_that_the_server_is_there(server: Running) -> None:
    assert server.client.get("/").text == "Ollama is running"
    assert server.client.head("/").status_code == 200
    major, minor, _ = map(int, server.client.get("/api/version").json()["version"].split("."))
    assert (major, minor) >= (0, 6)


@pytest.fixture
def fresh() -> Iterator[Running]:
    """A server that has loaded nothing."""
    with running() as started:
        yield started


def held(server: Running) -> dict[str, Any]:
    models = server.client.get("/api/ps").json()["models"]
    return {model["name"]: model for model in models}


@pytest.mark.parametrize(
    ("path", "empty"), [("/api/chat", {"messages": []}), ("/api/generate", {}),
                        ("/api/generate", {"prompt": ""})]
)  # fmt: skip
def test_nothing_asked_loads_and_unloads(fresh: Running, path: str, empty: dict[str, Any]) -> None:
    body = {"model": "nano", **empty}
    assert held(fresh) == {}
    for more, reason, names in (
        ({}, "load", {"nano:latest"}),
        ({"keep_alive": 0}, "unload", set()),
        ({"keep_alive": "0s"}, "unload", set()),
    ):
        answer = fresh.post(path, {**body, **more}).json()
        assert (answer["done"], answer["done_reason"]) == (True, reason)
        assert set(held(fresh)) == names


@pytest.mark.parametrize(
    ("keep_alive", "seconds"),
    [("10m", 600), (90, 90), ("1h30m", 5400), (-1, 10**9), ("-1m", 10**9), (None, 300)],
)
def test_a_model_stays_as_long_as_it_is_told(
    fresh: Running, keep_alive: Any, seconds: float
) -> None:
    fresh.post("/api/chat", chat(keep_alive=keep_alive))
    expires = datetime.fromisoformat(held(fresh)["nano:latest"]["expires_at"])
    remaining = (expires - datetime.now(UTC)).total_seconds()
    assert seconds - SECONDS < remaining
    assert seconds == 10**9 or remaining <= seconds


def test_a_reply_may_be_the_last_of_its_model(fresh: Running) -> None:
    assert fresh.post("/api/chat", chat(keep_alive=0)).status_code == 200
    deadline = time.monotonic() + SECONDS
    while held(fresh):
        assert time.monotonic() < deadline
    assert fresh.post("/api/chat", chat()).status_code == 200


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("5m", 300), ("1h2m3s", 3723), ("1.5h", 5400), ("300ms", 0.3), (0, 0), ("0", 0), (2.5, 2.5)],
)
def test_durations(text: Any, seconds: float) -> None:
    assert duration.read_duration(text) == pytest.approx(seconds)


WEIGHTS = bytes(20_000)
REPOSITORY = "mlx-community/Phi-4-mini-instruct-4bit"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serve_alone(monkeypatch, tmp_path / "hub") as started:
        started.repos[REPOSITORY] = {
            "config.json": b'{"model_type": "phi3"}',
            "tokenizer.json": b"{}",
            "model.safetensors": WEIGHTS,
        }
        yield started


@pytest.mark.parametrize("name", ["phi-4-mini", "phi4-mini:latest"])
def test_a_model_is_pulled_with_progress(hub: Hub, client: ollama.Client, name: str) -> None:
    said = list(client.pull(name, stream=True))
    statuses = [each.status for each in said]
    assert statuses[0] == "pulling manifest"
    assert statuses[-3:] == ["verifying sha256 digest", "writing manifest", "success"]
    assert {each.total for each in said if each.digest} == {20_000, 22, 2}
    whole = [each for each in said if each.total == 20_000]
    assert whole[-1].completed == 20_000
    assert (whole[-1].digest or "").startswith("sha256:")
    assert "phi-4-mini:latest" in {model.model for model in client.list().models}
    assert client.pull(name).status == "success"


def test_a_client_that_goes_ends_its_download(
    hub: Hub, server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop, stopped = ollama_models.Pull.stop, list[ollama_models.Pull]()
    went = threading.Event()

    def note(pull: ollama_models.Pull) -> None:
        stop(pull)
        stopped.append(pull)
        went.set()

    monkeypatch.setattr(ollama_models.Pull, "stop", note)
    hub.faults["model.safetensors"] = [Fault(hold=10_000)]
    with server.client.stream("POST", "/api/pull", json={"model": "phi-4-mini"}) as answer:
        for line in answer.iter_lines():
            if json.loads(line).get("total") == len(WEIGHTS):
                break
    assert went.wait(SECONDS)
    hub.release.set()
    stopped[0].thread.join(SECONDS)
    assert not stopped[0].thread.is_alive()
    names = {model["name"] for model in server.client.get("/api/tags").json()["models"]}
    assert "phi-4-mini:latest" not in names


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", ["gone", "/etc/passwd", "someone/gone", "phi4:14b"])
def test_what_cannot_be_pulled_says_why(
    hub: Hub, server: Running, client: ollama.Client, name: str, stream: bool
) -> None:
    with pytest.raises(ollama.ResponseError):
        list(client.pull(name, stream=True)) if stream else client.pull(name)
    answer = server.post("/api/pull", {"model": name, "stream": False})
    assert (answer.status_code, list(answer.json())) == (404, ["error"])


def test_one_model_alone_is_not_joined_by_others() -> None:
    with running(model="nano") as server:
        answer = server.post("/api/pull", {"model": "phi-4-mini", "stream": False})
        assert (answer.status_code, answer.json()) == (
            400,
            {"error": "This server serves nano alone."},
        )


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("/api/chat", {"model": None}, "model is missing"),
    ("/api/chat", {"model": ""}, "model: "),
    ("/api/chat", {"model": 5}, "model: "),
    ("/api/chat", {"messages": "x"}, "messages: "),
    ("/api/chat", {"messages": [5]}, "messages.0: "),
    ("/api/chat", {"messages": [{"content": "x"}]}, "messages.0.role is missing"),
    ("/api/chat", {"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role: "),
    ("/api/chat", {"messages": [{"role": "user", "content": 5}]}, "messages.0.content: "),
    ("/api/chat", {"messages": [{"role": "user", "content": "x", "images": ["???"]}]},
     "messages[0].content[0] has data that is not base64"),
    ("/api/chat", {"messages": [{"role": "user", "content": "x", "images": [
        base64.b64encode(b"no picture").decode()]}]}, "nano reads text alone"),
    ("/api/chat", {"messages": [{"role": "assistant", "tool_calls": [
        {"function": {"name": "f", "arguments": "{}"}}]}]}, "messages.0.tool_calls.0.function."),
    ("/api/chat", {"tools": "x"}, "tools: "),
    ("/api/chat", {"tools": [{"type": "function"}]}, "tools[0] has no name"),
    ("/api/chat", {"tools": [{"type": "web", "function": {"name": "f"}}]}, "tools[0] has the type"),
    ("/api/chat", {"stream": "yes"}, "stream: "),
    ("/api/chat", {"think": "sometimes"}, "think: "),
    ("/api/chat", {"think": True}, "nano does not support thinking"),
    ("/api/chat", {"think": "high"}, "nano does not support thinking"),
    ("/api/chat", {"format": "xml"}, "format: "),
    ("/api/chat", {"format": 5}, "format: "),
    ("/api/chat", {"format": {"type": 5}}, "A reply cannot be held to this"),
    ("/api/chat", {"keep_alive": "soon"}, "keep_alive: "),
    ("/api/chat", {"keep_alive": "5"}, "keep_alive: "),
    ("/api/chat", {"keep_alive": True}, "keep_alive: "),
    ("/api/chat", {"options": []}, "options: "),
    ("/api/chat", {"options": {"temperature": "hot"}}, "options.temperature: "),
    ("/api/chat", {"options": {"temperature": -1}}, "options.temperature: "),
    ("/api/chat", {"options": {"top_p": 0}}, "options.top_p: "),
    ("/api/chat", {"options": {"min_p": 2}}, "options.min_p: "),
    ("/api/chat", {"options": {"num_predict": "many"}}, "options.num_predict: "),
    ("/api/chat", {"options": {"stop": [5]}}, "options.stop.0: "),
    ("/api/chat", {"options": {"stop": ["x" * 1025]}}, "options.stop.0: "),
    ("/api/chat", {"options": {"seed": "x"}}, "options.seed: "),
    ("/api/chat", {"options": {"mirostat": 2}}, "options.mirostat must be 0 here"),
    ("/api/chat", {"options": {"typical_p": 0.5}}, "options.typical_p must be 1 here"),
    ("/api/chat", {"options": {"repeat_last_n": 64, "repeat_penalty": 1.1}},
     "options.repeat_last_n must be -1 here"),
    ("/api/chat", {"truncate": "x"}, "truncate: "),
    ("/api/chat", {"shift": 5}, "shift: "),
    ("/api/chat", {"messages": [{"role": "user", "content": "x" * 20_000}]}, "The prompt has "),
    ("/api/chat", {"truncate": True, "shift": True,
                   "messages": [{"role": "user", "content": "x" * 20_000}]}, "The prompt has "),
    ("/api/generate", {"prompt": 5}, "prompt: "),
    ("/api/generate", {"suffix": "x"}, "nano does not support insert"),
    ("/api/generate", {"template": "{{ .Prompt }}"}, "template: "),
    ("/api/generate", {"raw": True, "system": "x"}, "raw mode does not support"),
    ("/api/generate", {"raw": True, "context": [1]}, "raw mode does not support"),
    ("/api/generate", {"context": ["x"]}, "context.0: "),
    ("/api/generate", {"context": [999_999]}, "The prompt holds 999999"),
    ("/api/generate", {"context": [-1]}, "The prompt holds -1"),
    ("/api/generate", {"context": [1], "images": ["eA=="]}, "images: "),
    ("/api/generate", {"raw": True, "images": ["???"]}, "images: "),
    ("/api/generate", {"images": ["eA=="]}, "nano reads text alone"),
    ("/api/embed", {}, "The models here make no embeddings"),
    ("/api/create", {}, "Models are made with"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "change", "message"), BAD)
def test_a_bad_request_is_refused_in_ollamas_shape(
    server: Running, path: str, change: dict[str, Any], message: str
) -> None:
    answer = server.post(path, (chat() if path == "/api/chat" else generate()) | change)
    assert answer.status_code == 400
    found = answer.json()
    assert list(found) == ["error"]
    assert found["error"].startswith(message)
    assert server.post("/api/chat", chat()).status_code == 200


@pytest.mark.parametrize(
    ("path", "content", "status"),
    [
        ("/api/chat", b"{", 400),
        ("/api/chat", b"[]", 400),
        ("/api/chat", b'{"model": "gone", "messages": [{"role": "user", "content": "x"}]}', 404),
        ("/api/chat", b'{"model": "gone"}', 404),
        ("/api/generate", b'{"model": "gone", "keep_alive": 0}', 404),
        ("/api/show", b'{"model": "../etc"}', 404),
        ("/api/nowhere", b"{}", 404),
    ],
)
def test_other_errors_have_the_shape_too(
    server: Running, path: str, content: bytes, status: int
) -> None:
    answer = server.client.post(path, content=content)
    assert (answer.status_code, list(answer.json())) == (status, ["error"])


def test_unknown_fields_are_ignored(server: Running) -> None:
    body = chat(nonsense=1)
    body["messages"][0]["nonsense"] = 2
    assert server.post("/api/chat", body).status_code == 200


def test_an_error_in_a_stream_is_a_line(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Engine) -> None:
        raise RuntimeError("inside")

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", fail)
        *_, last = lines(server.post("/api/chat", chat(stream=True)).text)
    assert list(last) == ["error"]
    assert "inside" not in last["error"]
    assert server.post("/api/chat", chat()).status_code == 200
