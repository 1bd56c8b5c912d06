"""A model behind a server answers as the same model that is loaded here."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile  # type: ignore[import-untyped]
from PIL import Image

from phimlx.api import Phi, load
from phimlx.errors import GenerationError, MediaError, ModelNotFoundError, RemoteError
from phimlx.media.audio import load_audio
from phimlx.media.limits import Limits
from phimlx.remote.client import Client
from phimlx.remote.phi import RemotePhi
from phimlx.terminal.interrupt import Interruptible
from tests.server.conftest import Say
from tests.server.running import SECONDS, Running

QUESTION = [{"role": "user", "content": "What is 2 plus 3?"}]
TOOLS = [
    {
        "description": "Weather of a town.",
        "name": "weather",
        "parameters": {"properties": {"town": {"type": "string"}}, "type": "object"},
    }
]
CALLS = '<|tool_call|>[{"name": "weather", "arguments": {"town": "Zürich"}}]<|/tool_call|>'
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12}
WARM: dict[str, Any] = {"temperature": 1.4, "seed": 3, "max_tokens": 12}

CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "text": ("Tell me a story.", GREEDY),
    "seeded": ("Tell me a story.", WARM),
    "every setting": (
        "Tell me a story.",
        {**WARM, "top_k": 9, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2}
        | {"presence_penalty": 0.5, "frequency_penalty": 0.5, "logit_bias": {5: 3.0}},
    ),
    "stop": ("Tell me a story.", {**GREEDY, "stop": ("e",)}),
    "system": ([{"role": "system", "content": "Be brief."}, *QUESTION], GREEDY),
    "schema": (QUESTION, {**GREEDY, "max_tokens": 40, "schema": {"enum": ["a", "b"]}}),
    "object": (
        QUESTION,
        {
            **WARM,
            "max_tokens": 40,
            "schema": {"type": "object", "properties": {"n": {"type": "boolean"}}}
            | {"required": ["n"], "additionalProperties": False},
        },
    ),
    "regex": (QUESTION, {**GREEDY, "regex": "[a-c]{5}"}),
    "grammar": (QUESTION, {**GREEDY, "grammar": 'start: "x" "y"'}),
    "tools": (QUESTION, {**GREEDY, "tools": TOOLS}),
    "tool choice": (QUESTION, {**WARM, "max_tokens": 60, "tools": TOOLS, "tool_choice": "weather"}),
    "results": (
        [
            *QUESTION,
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [
                    {"name": "weather", "arguments": {"town": "Zürich", "day": 1}},
                    {"name": "weather", "arguments": {}},
                ],
            },
            {"role": "tool", "content": '"sun"'},
            {"role": "tool", "content": "rain"},
        ],
        {**GREEDY, "tools": TOOLS},
    ),
    "an answer last": ([*QUESTION, {"role": "assistant", "content": "5"}], GREEDY),
    "begun": (
        [*QUESTION, {"role": "assistant", "content": "Once"}],
        {**GREEDY, "continue_final_message": True},
    ),
    "half a character": ([{"role": "user", "content": "a\ud800b"}], GREEDY),
}


def told(reply: Any) -> dict[str, Any]:
    """What `generate --json` prints, without what differs from run to run."""
    made = reply.as_object("")
    stats = made.pop("stats")
    counts = ("prompt_tokens", "generated_tokens")
    return {**made, **{name: stats[name] for name in counts}}


@pytest.mark.parametrize("case", CASES)
def test_a_reply_is_that_of_the_model_here(remote: RemotePhi, nano: Phi, case: str) -> None:
    prompt, options = CASES[case]
    expected = nano.generate(prompt, **options)
    stream = remote.stream(prompt, **options, cache=None, on_prefill=print)
    chunks = list(stream)
    seeded = {"seed": expected.seed if "seed" in options else stream.reply.seed}
    assert told(stream.reply) == told(expected) | seeded
    assert "".join(chunk.text for chunk in chunks) == expected.text + (expected.reasoning or "")
    assert stream.reply.stats.forward_passes > 0


@pytest.mark.parametrize(("text", "tools"), [("<think>2 and 3.</think>5", None), (CALLS, TOOLS)])
def test_reasoning_and_calls(remote: RemotePhi, nano: Phi, say: Say, text: str, tools: Any) -> None:
    say(text)
    options = {**GREEDY, "max_tokens": 60, "seed": 1, "tools": tools}
    expected = nano.generate(QUESTION, **options)
    assert expected.reasoning or expected.tool_calls
    stream = remote.stream(QUESTION, **options)
    chunks = list(stream)
    assert told(stream.reply) == told(expected)
    reasoning = "".join(chunk.text for chunk in chunks if chunk.kind == "reasoning")
    assert reasoning == (expected.reasoning or "")
    assert [call for chunk in chunks for call in chunk.tool_calls] == expected.tool_calls


def test_what_is_known_of_the_model(remote: RemotePhi, nano: Phi) -> None:
    for name in ("name", "context_length", "is_base", "takes_media", "hears", "chat_form"):
        assert getattr(remote, name) == getattr(nano, name)
    assert remote.sampling.temperature == nano.sampling.temperature
    tools = {"tools": TOOLS}
    assert remote.encode(QUESTION, **tools) == nano.encode(QUESTION, **tools)


def test_a_second_turn_begins_where_the_first_ended(remote: RemotePhi) -> None:
    first = [{"role": "user", "content": "Tell me a long story of a fox, and of a crow. " * 4}]
    remote.stream(first, **GREEDY).result()
    again = remote.stream(first, **GREEDY).result()
    assert again.stats.cached_tokens > 0


@pytest.mark.slow
def test_pictures_and_sounds(server: Running, tmp_path: Path) -> None:
    seeing = load("nano-multimodal")
    remote = RemotePhi.connect(Client(server.url), "nano-multimodal")
    assert remote.takes_media
    picture = Image.effect_noise((90, 60), 50).convert("RGB")
    picture.save(tmp_path / "a.jpg")
    soundfile.write(tmp_path / "a.wav", np.sin(np.arange(9000) / 9), 22050)
    clip = load_audio(tmp_path / "a.wav")
    data = (tmp_path / "a.jpg").read_bytes()
    parts = [{"type": "image", "image": picture}, {"type": "audio", "audio": clip}]
    parts += [{"type": "image", "image": data}, {"type": "text", "text": "What is it?"}]
    for prompt, options in (
        ("What is it?", {"images": [str(tmp_path / "a.jpg")], "audio": [str(tmp_path / "a.wav")]}),
        ([{"role": "user", "content": parts}], {}),
    ):
        given = {**GREEDY, "max_tokens": 6, "seed": 1, **options}
        expected = seeing.generate(prompt, **given)
        assert told(remote.stream(prompt, **given).result()) == told(expected)
    with pytest.raises(MediaError, match="larger than"):
        remote.stream("What?", images=[data], limits=Limits(max_bytes=10))


def running_replies(server: Running) -> int:
    return int(server.client.get("/health").json()["running"])


def test_ctrl_c_frees_the_row(remote: RemotePhi, server: Running) -> None:
    stream = remote.stream("Tell me a story.", temperature=1.0, seed=1, regex="[a-z ]{4000}")
    answer = Interruptible(stream)
    for chunk in answer:
        if chunk.text:
            signal.raise_signal(signal.SIGINT)
    assert (answer.interrupted, answer.cut) == (True, False)
    deadline = time.monotonic() + SECONDS
    while running_replies(server):
        assert time.monotonic() < deadline


def test_who_closes_the_stream_frees_the_row(remote: RemotePhi, server: Running) -> None:
    stream = remote.stream("Tell me a story.", temperature=1.0, seed=1, regex="[a-z ]{4000}")
    for chunk in stream:
        if chunk.text:
            break
    stream.close()
    assert stream.reply.finish_reason == "cancelled"
    assert stream.reply.text
    assert 0 < stream.reply.stats.generated_tokens < 400
    deadline = time.monotonic() + SECONDS
    while running_replies(server):
        assert time.monotonic() < deadline


@pytest.mark.parametrize(
    "option",
    [
        {"raw": True},
        {"logprobs": True},
        {"kv_bits": 8},
        {"prompt_logprobs": 1},
    ],
)
def test_what_no_server_does(remote: RemotePhi, option: dict[str, Any]) -> None:
    with pytest.raises(GenerationError, match=f"A server does not take {next(iter(option))}."):
        remote.stream("Hello", **option)


def test_token_ids_are_no_prompt_for_a_server(remote: RemotePhi) -> None:
    with pytest.raises(GenerationError, match="not token ids"):
        remote.stream([1, 2])


def test_what_the_server_refuses(remote: RemotePhi, server: Running) -> None:
    with pytest.raises(GenerationError) as caught:
        remote.stream("Hello", temperature=3).result()
    assert str(caught.value).startswith(f"The server at {server.url} says: temperature: ")
    with pytest.raises(ModelNotFoundError, match="There is no model nemo here"):
        RemotePhi.connect(Client(server.url), "nemo")
    with pytest.raises(RemoteError, match="cannot be reached"):
        Client("http://127.0.0.1:1").ask("/health")


def test_a_chat_runs_functions_here(remote: RemotePhi, say: Say) -> None:
    def weather(town: str) -> str:
        """Weather of a town."""
        say("It shines.")
        return f"sun in {town}"

    say(CALLS)
    result = remote.chat("Is it warm?", [weather], tool_choice="weather")
    assert result.messages == [
        {"role": "user", "content": "Is it warm?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"name": "weather", "arguments": {"town": "Zürich"}}],
        },
        {"role": "tool", "name": "weather", "content": "sun in Zürich"},
        {"role": "assistant", "content": "It shines."},
    ]
