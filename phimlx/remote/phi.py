"""A model behind a server, with what conversations need of `phimlx.Phi`."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field, fields
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

from phimlx.generation.reply import Chunk, Reply, Stats
from phimlx.generation.stream import ChunkStream
from phimlx.prompt.tools import ToolCall, read_calls
from phimlx.remote.body import chat_body
from phimlx.remote.client import LOADING_SECONDS, Client
from phimlx.tools.chat import Chats

REASONS = ("stop", "length", "tool_calls")
MOST_CALLS = 1024


@dataclass(frozen=True)
class About:
    """What a server tells of a model.

    Attributes:
        stamp: tells its files, as they were when it was loaded, from any others.
        max_tokens: the most that the server lets a reply have; None where it sets no limit.
        chat_form, context_length, hears, is_base, name, sampling, takes_media: as of `Phi`.
    """

    name: str
    stamp: str
    context_length: int
    is_base: bool
    takes_media: bool
    hears: bool
    chat_form: str | None
    max_tokens: int | None
    sampling: Mapping[str, float]

    @classmethod
    def read(cls, value: Any, client: Client) -> About:
        """Check what came; raises RemoteError where it tells of no model."""
        try:
            about = cls(**{each.name: value[each.name] for each in fields(cls)})
        except (KeyError, TypeError):
            raise client.stranger() from None
        kinds = {
            "name": str,
            "stamp": str,
            "context_length": int,
            "is_base": bool,
            "takes_media": bool,
            "hears": bool,
            "chat_form": str | None,
            "max_tokens": int | None,
            "sampling": dict,
        }
        fits = all(isinstance(getattr(about, name), kind) for name, kind in kinds.items())
        if (
            not fits
            or about.context_length < 1
            or not all(map(_is_number, about.sampling.values()))
        ):
            raise client.stranger()
        return about


def loaded_models(client: Client, seconds: float = LOADING_SECONDS) -> list[About]:
    """List the models that a server holds; raises PhimlxError where it cannot be asked."""
    found = client.ask("/phimlx/models", seconds=seconds).get("models")
    if not isinstance(found, list):
        raise client.stranger()
    return [About.read(value, client) for value in found]


class RemotePhi(Chats):
    """A model that a server holds. What it answers is what the same model loaded here answers.

    Its server keeps the beginnings of prompts, so that there is no cache to hold here.

    Attributes:
        url: of the server.
        chat_form, context_length, hears, is_base, name, takes_media: as of `Phi`.
        sampling: the model's own settings, as attributes.
    """

    def __init__(self, client: Client, about: About) -> None:
        self._client = client
        self.url = client.url
        self.name = about.name
        self.context_length = about.context_length
        self.is_base = about.is_base
        self.takes_media = about.takes_media
        self.hears = about.hears
        self.chat_form = about.chat_form
        self.sampling = SimpleNamespace(**about.sampling)

    @classmethod
    def connect(cls, client: Client, model: str) -> RemotePhi:
        """Let a server load a model by its name.

        Raises:
            PhimlxError: where it has none of that name, or cannot be asked.
        """
        found = client.ask(f"/phimlx/models/{quote(model, safe='')}")
        return cls(client, About.read(found, client))

    def stream(self, prompt: Any = "", **options: Any) -> RemoteStream:
        """Start a reply; arguments as of `Phi.stream`, as far as a server takes them.

        Raises:
            GenerationError: for an option that no server takes.
            MediaError: where a picture, sound or video cannot be read.
        """
        seed = options.pop("seed", None)
        seed = secrets.randbits(32) if seed is None else seed
        body = chat_body(self.name, prompt, {**options, "seed": seed})
        return RemoteStream(self._client, body, seed, options.get("schema"))

    def encode(self, prompt: Any = "", **options: Any) -> list[int]:
        """Encode a prompt as tokens; errors as of `stream`."""
        found = self._client.ask("/phimlx/tokens", chat_body(self.name, prompt, options))
        tokens = found.get("tokens")
        if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
            raise self._client.stranger()
        return tokens

    def new_cache(self, kv_bits: int | None = None, prefixes: object = None) -> None:
        """Make no cache: the server has its own."""

    def prefix_store(
        self, note: Callable[[str], object] = lambda text: None, **settings: Any
    ) -> None:
        """Open no store: the server has its own."""


@dataclass
class Said:
    """Content of a reply as it has come so far."""

    texts: dict[str, list[str]] = field(default_factory=lambda: {"text": [], "reasoning": []})
    tool_calls: list[ToolCall] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.texts["text"])

    @property
    def reasoning(self) -> str:
        return "".join(self.texts["reasoning"])


class RemoteStream(ChunkStream):
    """The chunks of one reply; `reply` holds what there is so far.

    The server is asked with the first chunk. Closing the stream hangs up, which ends the reply
    there. A chunk tells no token; one without text is a sign of life.
    """

    def __init__(self, client: Client, body: Mapping[str, Any], seed: int, schema: Any) -> None:
        self._said = Said()
        self._client = client
        self._calls: list[dict[str, str]] = []
        options = {"include_usage": False, "include_stats": True}
        whole = {**body, "stream": True, "stream_options": options}
        events = client.events("/v1/chat/completions", whole)
        super().__init__(Reply(seed, self._said), self._read(events))
        if schema is not None:
            from phimlx.generation.grammar.schema import answer_reader

            self.reply.read_answer = answer_reader(schema)

    def _read(self, events: Iterator[dict[str, Any] | None]) -> Generator[Chunk]:
        try:
            for event in events:
                try:
                    chunks = [Chunk("", None)] if event is None else self._take(event)
                except (AttributeError, LookupError, TypeError, ValueError):
                    raise self._client.stranger() from None
                yield from chunks
            if self.reply.finish_reason not in REASONS:
                raise self._client.stranger()
        finally:
            events.close()  # type: ignore[attr-defined]

    def _take(self, event: dict[str, Any]) -> list[Chunk]:
        """Take an event; raises what Python does where it is none."""
        [choice] = event["choices"]
        delta, chunks = choice["delta"], []
        self.reply.stats = _stats(event["stats"])
        for kind, name in (("reasoning", "reasoning_content"), ("text", "content")):
            if text := delta.get(name):
                self._said.texts[kind].append(text + "")
                chunks.append(Chunk(text, None, kind))
        for call in delta.get("tool_calls", ()):
            self._add_call(call)
        if choice["finish_reason"] is not None:
            calls = tuple(read_calls(self._calls)) if self._calls else ()
            self._said.tool_calls += calls
            self._said.warnings += [text + "" for text in event["warnings"]]
            self.reply.finish_reason = choice["finish_reason"]
            chunks += [Chunk("", None, tool_calls=calls)] if calls else []
        return chunks

    def _add_call(self, part: dict[str, Any]) -> None:
        """Take a piece of a call: its name, or some of its arguments."""
        if not 0 <= part["index"] <= len(self._calls) < MOST_CALLS:
            raise ValueError
        if part["index"] == len(self._calls):
            self._calls.append({"name": part["function"]["name"], "arguments": ""})
        self._calls[part["index"]]["arguments"] += part["function"]["arguments"]


def _stats(value: dict[str, Any]) -> Stats:
    stats = Stats(**value)
    if not all(map(_is_number, value.values())):
        raise ValueError
    return stats


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
