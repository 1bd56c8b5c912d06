"""The bodies of responses: items in, checked and put into no dialect."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, TypeAdapter

from phimlx.generation.logprobs import MAX_TOP
from phimlx.server.errors import bad_request
from phimlx.server.http import MAX_MESSAGES, Body, Refusal
from phimlx.server.openai.bodies import (
    MAX_TOOLS,
    Effort,
    FormatSchema,
    Function,
    HintsBody,
    PlainFormat,
    ToolChoice,
    chosen,
    select_tools,
    wants_reasoning,
)
from phimlx.server.openai.messages import DETAIL, InputAudio
from phimlx.server.service import Ask

LOGPROBS = "message.output_text.logprobs"
INCLUDED = Literal["message.output_text.logprobs", "reasoning.encrypted_content"]


class TextPart(Body):
    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class RefusalPart(Body):
    type: Literal["refusal"]
    refusal: str

    @property
    def text(self) -> str:
        return self.refusal


class ImagePart(Body):
    refused: ClassVar = {**DETAIL, "file_id": Refusal("no files are kept here; send image_url")}

    type: Literal["input_image"]
    image_url: str

    def read(self) -> dict[str, Any]:
        return {"type": "image_url", "image_url": {"url": self.image_url}}


class AudioPart(Body):
    type: Literal["input_audio"]
    input_audio: InputAudio

    def read(self) -> dict[str, Any]:
        return {"type": "input_audio", "input_audio": {"data": self.input_audio.data}}


def _as_parts(content: Any) -> Any:
    return [{"type": "input_text", "text": content}] if isinstance(content, str) else content


AnyPart = TextPart | RefusalPart | ImagePart | AudioPart
Parts = Annotated[list[Annotated[AnyPart, Field(discriminator="type")]], BeforeValidator(_as_parts)]


class Item(Body):
    """What a client may send back of an item that it got."""

    id: str | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None


class MessageItem(Item):
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Parts
    phase: str | None = None

    def turn(self) -> dict[str, Any]:
        role = "system" if self.role == "developer" else self.role
        if all(isinstance(part, TextPart | RefusalPart) for part in self.content):
            return {"role": role, "content": _text(self.content)}
        return {"role": role, "content": _parts(self.content)}


class CallItem(Item):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    namespace: str | None = None
    caller: dict[str, Any] | None = None


class ResultItem(Item):
    type: Literal["function_call_output"]
    call_id: str
    output: Parts
    caller: dict[str, Any] | None = None


class ReasoningItem(Item):
    """Reasoning of earlier turns, which is left out, as templates have it."""

    type: Literal["reasoning"]
    summary: list[dict[str, Any]] | None = None
    content: list[dict[str, Any]] | None = None
    encrypted_content: str | None = None


class ReferenceItem(Body):
    type: Literal["item_reference"]
    id: str


def _typed(item: Any) -> Any:
    """Name the type of a message that leaves it out."""
    if isinstance(item, dict) and "role" in item and item.get("type") is None:
        return {**item, "type": "message"}
    return item


AnyItem = Annotated[
    MessageItem | CallItem | ResultItem | ReasoningItem | ReferenceItem,
    Field(discriminator="type"),
]
SentItem = Annotated[AnyItem, BeforeValidator(_typed)]
ITEM: TypeAdapter[Any] = TypeAdapter(AnyItem)


def _as_items(value: Any) -> Any:
    return (
        [{"type": "message", "role": "user", "content": value}] if isinstance(value, str) else value
    )


class FunctionTool(Function):
    type: Literal["function"]
    defer_loading: Literal[False] | None = None

    def functions(self) -> list[FunctionTool]:
        return [self]


class NamespaceTool(Body):
    """Functions that a client groups under a name, as Codex does."""

    type: Literal["namespace"]
    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,128}$")
    description: str | None = None
    tools: list[FunctionTool] = Field(max_length=MAX_TOOLS)

    def functions(self) -> list[FunctionTool]:
        return self.tools


class NoSearch(Body):
    """A search of the web that must not go there, as Codex offers by default: none."""

    type: Literal["web_search"]
    external_web_access: Literal[False]

    def functions(self) -> list[FunctionTool]:
        return []


def _known_tool(value: Any) -> Any:
    kind = value.get("type") if isinstance(value, dict) else "function"
    offline = kind == "web_search" and value.get("external_web_access") is False
    if kind not in (None, "function", "namespace") and not offline:
        raise ValueError(
            f"{str(kind)[:100]} is a tool of OpenAI's own servers; only functions are known here"
        )
    return value


class NamedTool(ToolChoice):
    type: Literal["function"]
    name: str

    def read(self) -> tuple[str, list[str] | None]:
        return self.name, None


class AllowedTools(ToolChoice):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: list[NamedTool] = Field(min_length=1, max_length=MAX_TOOLS)

    def read(self) -> tuple[str, list[str] | None]:
        return self.mode, [tool.name for tool in self.tools]


class SchemaFormat(FormatSchema):
    type: Literal["json_schema"]


class TextConfig(Body):
    refused: ClassVar = {
        "verbosity": Refusal("say in a message how long the answer is to be", ("medium",))
    }

    format: Annotated[PlainFormat | SchemaFormat, Field(discriminator="type")] = PlainFormat(
        type="text"
    )


class Reasoning(Body):
    effort: Effort | None = None
    summary: Literal["auto", "none"] | None = None
    generate_summary: Literal["auto"] | None = None


class StreamOptions(Body):
    include_obfuscation: bool = False


class ResponseBody(HintsBody):
    """The body of a response."""

    refused: ClassVar = {
        "background": Refusal("responses come while the client waits", (False,)),
        "background_options": Refusal("responses come while the client waits"),
        "context_management": Refusal("nothing of a conversation is left out here", ([],)),
        "conversation": Refusal("no conversations are kept here; use previous_response_id"),
        "image": Refusal("no pictures are drawn here"),
        "moderation": Refusal("nothing is moderated here"),
        "prompt": Refusal("no prompts are kept here; send instructions and input"),
        "truncation": Refusal("nothing of a conversation is left out here", ("disabled",)),
    }

    model: str
    input: Annotated[
        list[SentItem], BeforeValidator(_as_items), Field(min_length=1, max_length=MAX_MESSAGES)
    ]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    max_tool_calls: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_logprobs: int = Field(0, ge=0, le=MAX_TOP)
    tools: list[
        Annotated[FunctionTool | NamespaceTool | NoSearch, BeforeValidator(_known_tool)]
    ] = Field(default=[], max_length=MAX_TOOLS)
    tool_choice: (
        Literal["none", "auto", "required"]
        | Annotated[NamedTool | AllowedTools, Field(discriminator="type")]
    ) = "auto"
    parallel_tool_calls: bool = True
    text: TextConfig = TextConfig()
    reasoning: Reasoning = Reasoning()
    include: list[INCLUDED] = Field(default=[], max_length=16)
    previous_response_id: str | None = None
    store: bool = True
    stream: bool = False
    stream_options: StreamOptions | None = None
    client_metadata: dict[str, Any] | None = None

    @property
    def functions(self) -> list[FunctionTool]:
        """The functions that may be called, those of namespaces among them."""
        return [function for tool in self.tools for function in tool.functions()]

    def namespace(self, name: str) -> dict[str, str]:
        """The field that says to which namespace a function belongs; none where it has none."""
        groups = [tool for tool in self.tools if isinstance(tool, NamespaceTool)]
        found = [each.name for each in groups if name in {tool.name for tool in each.tools}]
        return {"namespace": found[0]} if found else {}

    @property
    def tells_logprobs(self) -> bool:
        return LOGPROBS in self.include or self.top_logprobs > 0

    def ask(self, turns: Sequence[dict[str, Any]]) -> Ask:
        """Say it in no dialect, after `turns`. Raises RequestError for what cannot be honoured."""
        if self.stream_options is not None and not self.stream:
            raise bad_request("stream_options: there is no stream.", "stream_options")
        names = [function.name for function in self.functions]
        if len(names) > MAX_TOOLS:
            raise bad_request(f"tools: there are more than {MAX_TOOLS}.", "tools")
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise bad_request(f"tools: {twice} is there more than once.", "tools")
        options = {
            "max_tokens": self.max_output_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "logprobs": self.tells_logprobs,
            "top_logprobs": self.top_logprobs,
            "continue_final_message": _continues(turns),
            **self.text.format.options(),
            **select_tools(self.functions, self.tool_choice),
        }
        told = (
            [] if self.instructions is None else [{"role": "system", "content": self.instructions}]
        )
        reasons = wants_reasoning(self.reasoning.effort)
        return Ask(self.model, [*told, *turns], chosen(options), fit=True, reasons=reasons)


def turns_of(items: Sequence[Any], before: Sequence[dict[str, Any]] = ()) -> list[dict[str, Any]]:
    """Put items into the form of `phimlx.prompt.messages`, after the turns `before` them.

    Calls belong to the turn of what the assistant said before them.

    Raises:
        RequestError: where a result is that of no call before it.
    """
    turns = list(before)
    called = {call["id"] for turn in turns for call in turn.get("tool_calls", ())}
    for index, item in enumerate(items):
        if isinstance(item, MessageItem):
            turns.append(item.turn())
        elif isinstance(item, CallItem):
            called.add(item.call_id)
            function = {"name": item.name, "arguments": item.arguments}
            last = turns[-1] if turns and turns[-1]["role"] == "assistant" else None
            said = {"role": "assistant", "content": ""} if last is None else turns.pop()
            calls = [*said.get("tool_calls", ()), {"id": item.call_id, "function": function}]
            turns.append({**said, "tool_calls": calls})
        elif isinstance(item, ResultItem):
            if item.call_id not in called:
                place = f"input.{index}.call_id"
                raise bad_request(
                    f"{place}: no call before it has the id {item.call_id[:100]}.", place
                )
            turns += _result(item)
    return turns


def _result(item: ResultItem) -> list[dict[str, Any]]:
    """Make the turn of a result; its pictures are a turn of the user, who may send some."""
    said = [part for part in item.output if isinstance(part, TextPart | RefusalPart)]
    shown = [part for part in item.output if not isinstance(part, TextPart | RefusalPart)]
    turn = {"role": "tool", "content": _text(said), "tool_call_id": item.call_id}
    return [turn, *([{"role": "user", "content": _parts(shown)}] if shown else [])]


def _continues(turns: Sequence[dict[str, Any]]) -> bool:
    """Whether the last turn is the beginning of the reply."""
    return bool(turns) and turns[-1]["role"] == "assistant" and "tool_calls" not in turns[-1]


def _text(parts: Sequence[Any]) -> str:
    return "".join(part.text for part in parts)


def _parts(parts: Sequence[Any]) -> list[dict[str, Any]]:
    return [
        part.read()
        if isinstance(part, ImagePart | AudioPart)
        else {"type": "text", "text": part.text}
        for part in parts
    ]
