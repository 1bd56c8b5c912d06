"""Messages of chat completions, checked and put into the form of `phimlx.prompt.messages`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from phimlx.server.errors import bad_request
from phimlx.server.http import Body, Refusal

DETAIL = {
    "detail": Refusal(
        "pictures are always seen in the detail that the model can see", ("auto", "high")
    )
}
AUDIO_FORMATS = Literal["wav", "mp3", "flac", "ogg", "opus", "m4a", "aac", "webm"]


def as_parts(content: Any) -> Any:
    """Make a list of parts of a text."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


class Part(Body):
    """A part of a message; what is cached is decided here."""

    cache_control: dict[str, Any] | None = None


class TextPart(Part):
    type: Literal["text"]
    text: str


class RefusalPart(Part):
    type: Literal["refusal"]
    refusal: str


class ImageUrl(Body):
    refused: ClassVar = DETAIL
    url: str


def _as_url(value: Any) -> Any:
    return {"url": value} if isinstance(value, str) else value


class ImagePart(Part):
    type: Literal["image_url"]
    image_url: Annotated[ImageUrl, BeforeValidator(_as_url)]

    def read(self) -> dict[str, Any]:
        return {"type": "image_url", "image_url": {"url": self.image_url.url}}


class InputAudio(Body):
    data: str
    format: AUDIO_FORMATS


class AudioPart(Part):
    type: Literal["input_audio"]
    input_audio: InputAudio

    def read(self) -> dict[str, Any]:
        return {"type": "input_audio", "input_audio": {"data": self.input_audio.data}}


Texts = Annotated[list[TextPart], BeforeValidator(as_parts), Field(min_length=1)]
Said = Annotated[
    list[Annotated[TextPart | ImagePart | AudioPart, Field(discriminator="type")]],
    BeforeValidator(as_parts),
    Field(min_length=1),
]
Answered = Annotated[
    list[Annotated[TextPart | RefusalPart, Field(discriminator="type")]],
    BeforeValidator(as_parts),
]


class Called(Body):
    """A function that was called, its arguments the text of an object."""

    name: str = Field(min_length=1)
    arguments: str


class Call(Body):
    id: str
    type: Literal["function"] = "function"
    function: Called
    index: int | None = None


class Instruction(Body):
    role: Literal["system", "developer"]
    content: Texts
    name: str | None = None

    def turn(self) -> dict[str, Any]:
        return {"role": "system", "content": _text(self.content)}


class UserMessage(Body):
    role: Literal["user"]
    content: Said
    name: str | None = None

    def turn(self) -> dict[str, Any]:
        if all(isinstance(part, TextPart) for part in self.content):
            return {"role": "user", "content": _text(self.content)}
        parts = [
            {"type": "text", "text": part.text} if isinstance(part, TextPart) else part.read()
            for part in self.content
        ]
        return {"role": "user", "content": parts}


class AssistantMessage(Body):
    """What was answered before; its reasoning is left out, as templates have it."""

    refused: ClassVar = {
        "audio": Refusal("replies are text"),
        "function_call": Refusal("this is the older form; send tool_calls"),
    }

    role: Literal["assistant"]
    content: Answered | None = None
    refusal: str | None = None
    tool_calls: list[Call] | None = None
    name: str | None = None
    annotations: list[Any] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    reasoning_details: list[Any] | None = None
    prefix: bool | None = None

    def turn(self) -> dict[str, Any]:
        content = _text(self.content) if self.content else self.refusal or ""
        turn: dict[str, Any] = {"role": "assistant", "content": content}
        if self.tool_calls:
            turn["tool_calls"] = [
                {"function": each.function.model_dump()} for each in self.tool_calls
            ]
        return turn


class ToolMessage(Body):
    role: Literal["tool"]
    content: Texts
    tool_call_id: str
    name: str | None = None

    def turn(self) -> dict[str, Any]:
        return {
            "role": "tool",
            "content": _text(self.content),
            "tool_call_id": self.tool_call_id,
        }


Message = Annotated[
    Instruction | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")
]


def turns(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Put messages into the form of `phimlx.prompt.messages`.

    Raises:
        RequestError: where a result is that of no call before it.
    """
    called: set[str] = set()
    for index, message in enumerate(messages):
        if isinstance(message, AssistantMessage):
            called |= {call.id for call in message.tool_calls or ()}
        if isinstance(message, ToolMessage) and message.tool_call_id not in called:
            place = f"messages.{index}.tool_call_id"
            raise bad_request(
                f"{place}: no call before it has the id {message.tool_call_id[:100]}.", place
            )
    return [message.turn() for message in messages]


def _text(parts: Sequence[TextPart | RefusalPart | Any]) -> str:
    return "".join(part.text if isinstance(part, TextPart) else part.refusal for part in parts)
