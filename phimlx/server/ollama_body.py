"""The bodies that Ollama's clients send, checked and put into no dialect."""

from __future__ import annotations

import base64
import binascii
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from phimlx.server.duration import read_duration
from phimlx.server.errors import bad_request
from phimlx.server.http import MAX_MESSAGES, MAX_STOPS, Body, StopString, dump
from phimlx.server.service import Ask

LATEST = ":latest"

LEVELS = ("low", "medium", "high", "max")

# Options that choose tokens in a way that is not had here -> the value with which they do not.
UNUSUAL: Mapping[str, Any] = {
    "mirostat": 0,
    "tfs_z": 1,
    "typical_p": 1,
    "penalize_newline": True,
    "repeat_last_n": -1,
}


def read_think(value: Any) -> Any:
    """Read whether a model is to think; levels are texts."""
    if not isinstance(value, bool) and value not in LEVELS:
        raise ValueError(f"it must be true, false or one of {', '.join(LEVELS)}")
    return value


def read_format(value: Any) -> Any:
    """Read the form of a reply: "json", or a schema."""
    if value not in ("", "json") and not isinstance(value, dict):
        raise ValueError('it must be "json" or a JSON schema')
    return value


def own_name(name: str) -> str:
    """The name of a model without the tag that Ollama's programs add."""
    return name.removesuffix(LATEST)


class OllamaBody(Body):
    """A body whose unknown fields are ignored."""

    model_config = ConfigDict(extra="ignore")


class ModelBody(OllamaBody):
    """A body that names a model, under `name` in older programs."""

    model: str = Field(min_length=1)
    stream: bool = True

    @model_validator(mode="before")
    @classmethod
    def _take_name(cls, value: Any) -> Any:
        given = isinstance(value, dict) and "model" not in value and "name" in value
        return {**value, "model": value["name"]} if given else value


class Options(OllamaBody):
    num_predict: int | None = None
    temperature: float | None = Field(default=None, ge=0)
    top_k: int | None = None
    top_p: float | None = Field(default=None, gt=0, le=1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    seed: int | None = None
    stop: list[StopString] | None = Field(default=None, max_length=MAX_STOPS)
    repeat_penalty: float | None = Field(default=None, gt=0)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    num_ctx: int | None = Field(default=None, ge=1)
    mirostat: int | None = None
    tfs_z: float | None = None
    typical_p: float | None = None
    penalize_newline: bool | None = None
    repeat_last_n: int | None = None

    @property
    def penalizes(self) -> bool:
        """Whether what has been said makes tokens less likely."""
        added = self.presence_penalty or self.frequency_penalty
        return bool(added) or self.repeat_penalty not in (None, 1)

    def chosen(self) -> dict[str, Any]:
        """Choose the options of `GenerationOptions`. Raises RequestError for an unusual one."""
        for name, usual in UNUSUAL.items():
            if name == "repeat_last_n" and not self.penalizes:
                continue
            if getattr(self, name) not in (None, usual):
                raise bad_request(f"options.{name} must be {dump(usual)} here.", f"options.{name}")
        limited = self.num_predict is not None and self.num_predict > 0
        seeded = self.seed is not None and self.seed >= 0
        return {
            "max_tokens": self.num_predict if limited else None,
            "temperature": self.temperature,
            "top_k": None if self.top_k is None else max(0, self.top_k),
            "top_p": self.top_p,
            "min_p": self.min_p,
            "seed": self.seed % 2**64 if self.seed is not None and seeded else None,
            "stop": tuple(filter(None, self.stop or ())),
            "repetition_penalty": self.repeat_penalty,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
        }


class Function(OllamaBody):
    name: str
    arguments: dict[str, Any] = Field(default_factory=dict)


class ToolCall(OllamaBody):
    function: Function


class Message(OllamaBody):
    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    images: list[str] | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None

    def read(self) -> dict[str, Any]:
        """Put it into the form of `phimlx.prompt.messages`."""
        content: Any = self.content or ""
        if self.images:
            content = [*map(_image, self.images), {"type": "text", "text": content}]
        calls = [call.function.model_dump() for call in self.tool_calls or ()]
        made = {
            "role": self.role,
            "content": content,
            "tool_calls": calls or None,
            "tool_call_id": self.tool_call_id,
        }
        return {name: value for name, value in made.items() if value is not None}


class ReplyBody(OllamaBody):
    """What bodies of chats and of completions have in common."""

    model: str = Field(min_length=1)
    stream: bool = True
    options: Options = Options()
    keep_alive: Annotated[float | None, BeforeValidator(read_duration)] = None
    think: Annotated[Any, BeforeValidator(read_think)] = None
    format: Annotated[Any, BeforeValidator(read_format)] = ""
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0, le=20)
    # What Ollama does by itself: here a prompt that does not fit is refused, and says so.
    truncate: bool = True
    shift: bool = True

    @property
    @abstractmethod
    def only_loads(self) -> bool:
        """Whether nothing is asked but that the model be there, or no longer."""

    @abstractmethod
    def ask(self) -> Ask:
        """Say it in no dialect. Raises RequestError for what cannot be honoured."""

    @abstractmethod
    def piece(self, text: str, **more: Any) -> dict[str, Any]:
        """Make what a line of the response says."""

    def context_of(self, tokens: list[int]) -> dict[str, Any]:
        """Make what the last line says of the tokens of prompt and reply."""
        return {}

    def asked(self, prompt: Any, before: Sequence[int] = (), **more: Any) -> Ask:
        """Ask with the options of this body, and more."""
        schema = {"type": "object"} if self.format == "json" else self.format or None
        options = {
            **self.options.chosen(),
            "schema": schema,
            "logprobs": self.logprobs,
            "top_logprobs": self.top_logprobs if self.logprobs else 0,
            **more,
        }
        return Ask(
            own_name(self.model),
            prompt,
            options,
            fit=True,
            before=before,
            keep_alive=self.keep_alive,
            reasons=None if self.think is None else bool(self.think),
            insists=False,
        )


class ChatBody(ReplyBody):
    messages: list[Message] = Field(default=[], max_length=MAX_MESSAGES)
    tools: list[dict[str, Any]] = Field(default=[], max_length=128)

    @property
    def only_loads(self) -> bool:
        return not self.messages

    def piece(self, text: str, **more: Any) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, **more}}

    def ask(self) -> Ask:
        messages = [message.read() for message in self.messages]
        last = self.messages[-1]
        goes_on = last.role == "assistant" and not last.tool_calls
        return self.asked(messages, tools=self.tools or None, continue_final_message=goes_on)


class GenerateBody(ReplyBody):
    prompt: str = ""
    suffix: str = ""
    images: list[str] = Field(default_factory=list)
    system: str = ""
    template: str = ""
    context: list[int] = Field(default_factory=list)
    raw: bool = False

    @property
    def only_loads(self) -> bool:
        return not self.prompt

    def piece(self, text: str, **more: Any) -> dict[str, Any]:
        return {"response": text, **more}

    def context_of(self, tokens: list[int]) -> dict[str, Any]:
        return {} if self.raw or self.images else {"context": tokens}

    def ask(self) -> Ask:
        if self.suffix:
            raise bad_request(f"{self.model} does not support insert.", "suffix")
        if self.raw and (self.template or self.system or self.context):
            raise bad_request("raw mode does not support template, system, or context.", "raw")
        if self.template:
            raise bad_request(
                "template: the model's own is used; write the whole prompt with raw instead.",
                "template",
            )
        if self.context and self.images:
            raise bad_request("images: they do not go with a context.", "images")
        if self.raw:
            images = [_decoded(image) for image in self.images]
            return self.asked(self.prompt, raw=True, images=images or None)
        messages = [
            Message(role="system", content=self.system or None),
            Message(role="user", content=self.prompt, images=self.images),
        ]
        return self.asked([each.read() for each in messages if each.content], self.context)


def _image(data: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}


def _decoded(image: str) -> bytes:
    try:
        return base64.b64decode(image, validate=True)
    except (binascii.Error, ValueError):
        raise bad_request("images: one of them is not base64.", "images") from None
