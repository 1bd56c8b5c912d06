"""Servers that are none of ours: they end, stall, lie, or are no servers at all."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from phimlx.errors import PhimlxError, RemoteError
from phimlx.remote import client as remote_client
from phimlx.remote.client import Client, server_root
from phimlx.remote.phi import About, RemotePhi
from tests.remote.strange import MODEL, answering, piece, stream_of

LAST = piece(delta={}, finish_reason="stop", warnings=[])
STRANGE: dict[str, bytes] = {
    "no JSON": b"data: {\n\n",
    "a list": stream_of([]),
    "nothing in it": stream_of({}),
    "no choices": stream_of(piece(choices=[])),
    "text that is none": stream_of(piece(delta={"content": 5})),
    "reasoning that is none": stream_of(piece(delta={"reasoning_content": ["a"]})),
    "stats that are text": stream_of(piece(stats={"prompt_tokens": "5"})),
    "unknown stats": stream_of(piece(stats={"x": 1})),
    "infinite stats": stream_of(piece()).replace(b": 0,", b": 1e999,", 1),
    "calls out of order": stream_of(piece(delta={"tool_calls": [{"index": 1}]})),
    "a call below zero": stream_of(piece(delta={"tool_calls": [{"index": -1}]})),
    "a call of nothing": stream_of(piece(delta={"tool_calls": [{"index": 0}]})),
    "arguments that are none": stream_of(
        piece(delta={"tool_calls": [{"index": 0, "function": {"name": "f", "arguments": "["}}]}),
        LAST,
    ),
    "an unknown end": stream_of(piece(delta={}, finish_reason="\x1b[2J", warnings=[])),
    "warnings that are none": stream_of(piece(delta={}, finish_reason="stop", warnings=[5])),
    "no end": stream_of(piece()),
    "a log-in page": b"<html>",
}


def phi_at(url: str) -> RemotePhi:
    client = Client(url)
    return RemotePhi(client, About.read(MODEL, client))


@pytest.mark.parametrize("case", STRANGE)
def test_a_stream_of_no_server_of_ours(case: str) -> None:
    with answering(200, STRANGE[case]) as url:
        with pytest.raises(RemoteError) as caught:
            phi_at(url).stream("Hello").result()
        assert url in str(caught.value)


def test_a_server_that_dies_in_the_middle_of_an_answer() -> None:
    with answering(200, stream_of(piece(), end=b"")) as url:
        stream = phi_at(url).stream("Hello")
        with pytest.raises(RemoteError) as caught:
            stream.result()
        assert str(caught.value) == f"The server at {url} ended in the middle of its answer."
        assert stream.reply.text == "Hi"
    with (
        answering(200, stream_of(piece(), end=b""), content_length="99999") as url,
        pytest.raises(RemoteError, match="ended in the middle of its answer"),
    ):
        phi_at(url).stream("Hello").result()


def test_an_answer_that_is_whole() -> None:
    last = LAST | {"warnings": ["Careful."]}
    with answering(200, b": ping\n\n" + stream_of(piece(), last)) as url:
        stream = phi_at(url).stream("Hello")
        assert [chunk.text for chunk in stream] == ["", "Hi"]
        assert (stream.reply.text, stream.reply.warnings) == ("Hi", ["Careful."])


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (500, b'{"error": {"message": "Oh."}}', "The server at {} says: Oh."),
        (429, b'{"error": {"message": "Later."}}', "The server at {} says: Later."),
        (401, b'{"error": {"message": "x"}}', "The server at {} wants a key, and this is not it."),
        (404, b"<html>", "What answers at {} does not speak as phimlx serve does."),
        (302, b"", "What answers at {} does not speak as phimlx serve does."),
        (500, b'{"error": 5}', "What answers at {} does not speak as phimlx serve does."),
        (500, b"x" * (1 << 17), "What answers at {} does not speak as phimlx serve does."),
        (200, stream_of({"error": {"message": "Oh."}}), "The server at {} says: Oh."),
    ],
)
def test_refusals(status: int, body: bytes, message: str) -> None:
    with answering(status, body, location="http://127.0.0.1:1/") as url:
        with pytest.raises(PhimlxError) as caught:
            phi_at(url).stream("Hello").result()
        assert str(caught.value) == message.format(url)


@pytest.mark.parametrize("change", [*MODEL, "sampling.x"])
def test_a_model_that_is_none(change: str) -> None:
    name, _, key = change.partition(".")
    value = MODEL | {name: {key: "hot"} if key else [1]}
    with answering(200, json.dumps(value).encode()) as url, pytest.raises(RemoteError):
        RemotePhi.connect(Client(url), "nano")


def test_tokens_that_are_none() -> None:
    with answering(200, b'{"tokens": ["a"]}') as url, pytest.raises(RemoteError):
        phi_at(url).encode("Hello")


@pytest.mark.parametrize("ask", [lambda phi: phi.encode("a"), lambda phi: phi.stream("a").result()])
def test_an_answer_without_end(
    ask: Callable[[RemotePhi], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_client, "LARGEST_ANSWER", 1000)
    with answering(200, b"x" * 5000) as url, pytest.raises(RemoteError, match="does not speak"):
        ask(phi_at(url))


@pytest.mark.parametrize(
    ("url", "root"),
    [
        ("http://127.0.0.1:8080", "http://127.0.0.1:8080"),
        ("127.0.0.1:8080/v1", "http://127.0.0.1:8080"),
        ("https://example.org/phi/v1/", "https://example.org/phi"),
        ("http://[::1]:8080/", "http://[::1]:8080"),
    ],
)
def test_addresses(url: str, root: str) -> None:
    assert server_root(url) == root


@pytest.mark.parametrize(
    "url",
    [
        *("", "http://", "ftp://a", "http://a:0", "http://a:99999", "http://u:p@a", "http://a?q"),
        *("http://a#f", "http://[::1", "http://a\nb", "http://a\x1b[2J", "file:///etc/passwd"),
    ],
)
def test_no_addresses(url: str) -> None:
    with pytest.raises(RemoteError, match="is no address of a server"):
        Client(url)
